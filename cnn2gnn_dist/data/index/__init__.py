"""From shards to a manifest: the rows, the classes that two data sets share, and file fingerprints."""
