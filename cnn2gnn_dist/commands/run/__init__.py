"""A run: start its stages, look at its checkpoints, fetch what its storage has."""
