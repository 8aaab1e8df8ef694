"""From sample ids to batches of pixels: readers, as threads or Ray actors, and their caches."""
