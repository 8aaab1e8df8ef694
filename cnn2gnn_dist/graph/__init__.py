"""The graph of a run: candidates, partitions, versions on disk, samplers, blocks."""
