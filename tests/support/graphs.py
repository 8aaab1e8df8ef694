"""Synthetic candidate tables."""

from __future__ import annotations

import numpy as np


def random_table(nodes: int, width: int, seed: int, holes: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = [rng.permutation([j for j in range(nodes) if j != i])[:width] for i in range(nodes)]
    table = np.array(rows, dtype=np.int32)
    if holes:
        table[rng.random(table.shape) < 0.2] = -1
    return table


def clustered(groups: int, size: int, width: int, seed: int = 0) -> np.ndarray:
    """Neighbors within the node's own group, except for one edge in ten."""
    rng = np.random.default_rng(seed)
    nodes = groups * size
    table = rng.integers(0, size, (nodes, width)) + (np.arange(nodes) // size * size)[:, None]
    far = rng.random(table.shape) < 0.1
    table[far] = rng.integers(0, nodes, far.sum())
    return table.astype(np.int32)
