"""From shards to a manifest: what each sample is, which classes two sets share, fingerprints of files."""
