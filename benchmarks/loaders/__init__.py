"""The contenders of `benchmarks/stream.py`, a small module for each.

A module has ``batches(job)``, a generator of uint8 batches whose first axis counts images, and,
where it reads a format of its own, ``prepare(job)``, which writes that format once.
"""
