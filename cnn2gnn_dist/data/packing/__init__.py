"""From images as they are found to WebDataset shards."""
