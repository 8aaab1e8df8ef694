"""Nodes to parts, and parts with their halos."""
