"""From sample ids to batches of pixels: readers, as threads or as Ray actors, and their caches."""
