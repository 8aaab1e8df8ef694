"""Checkpoints of named tensors: written by all ranks, read at any world size."""
