"""Faults of a training set, found by its own graph: scores, findings over a complete set, and their files."""
