"""What several stages use: context, networks, training loop, predictions, checks."""
