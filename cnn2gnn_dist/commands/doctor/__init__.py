"""``cnn2gnn doctor``: this machine, or every node of a cluster."""
