"""``cnn2gnn plan``: what a run needs, before you rent a machine: memory, disk, network, hours."""
