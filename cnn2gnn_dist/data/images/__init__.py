"""From the bytes of an image file to pixels: kinds of file, decoding, views."""
