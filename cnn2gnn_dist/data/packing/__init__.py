"""Packing of images into WebDataset shards."""
