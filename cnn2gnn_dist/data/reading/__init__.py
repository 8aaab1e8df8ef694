"""From sample ids to batches of pixels: readers, as threads, processes or Ray actors, and their caches."""
