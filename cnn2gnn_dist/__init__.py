"""cnn2gnn-dist: distil a CNN into a two-layer GNN over a graph learned from the images."""

__version__ = "0.1.0"
