"""Ray: a cluster of its own or one that is joined, groups of ranks, nodes, pools of actors, and what ends with them."""
