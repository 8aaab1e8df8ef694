"""``cnn2gnn plan``: what a run needs, before anybody rents a machine. Memory, disk, network, hours."""
