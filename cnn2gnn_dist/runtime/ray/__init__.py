"""Ray: a cluster started here or joined, groups of ranks, nodes, pools of actors, and what ends with them."""
