"""Assignment of nodes to partitions, and partitions with their halos."""
