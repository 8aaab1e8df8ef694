"""Networks and losses as pure torch: stems, teacher, graph head, GNN, student."""
