"""``cnn2gnn audit``: what it reads, what it finds, what its page shows."""
