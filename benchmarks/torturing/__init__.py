"""Faults of ``chaos.py --hosts``."""
