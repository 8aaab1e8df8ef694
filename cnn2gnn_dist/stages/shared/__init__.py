"""Code shared by several stages: context, networks, training loop, predictions, checks."""
