"""Storage of shards: folders, globs, URLs, transfers, and the cache of complete shards."""
