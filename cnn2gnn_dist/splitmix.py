"""splitmix64 (Steele, Lea & Flood, OOPSLA 2014) on arrays: random numbers without a state.

A number is the hash of what it is for (seed, sample, view; step, node, column), so that any can be
drawn alone, on any rank, in any order.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The generator's increment."""


def mixed(x: np.ndarray | np.uint64) -> np.ndarray:
    """uint64 → uint64, the generator's output function: a bijection that spreads every bit."""
    x = np.asarray(x, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
