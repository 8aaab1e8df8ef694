"""The contenders of ``benchmarks/stream.py``, one small module each.

A module has ``batches(job)``, a generator of uint8 batches whose first axis counts images, and,
if it reads its own format, ``prepare(job)``, which writes the data in that format once.
"""
