"""From the bytes of an image file to pixels: file kinds, decoding, views."""
