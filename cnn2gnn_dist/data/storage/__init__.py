"""Where shards lie: folders, globs, URLs, transfers, and the cache of whole copies."""
