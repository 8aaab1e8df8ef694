"""Twins: nodes that are the same image. A seed must not see its own label through a twin."""

from __future__ import annotations

import numpy as np

ROWS = 8192
SEED = 20_26


def groups(*keys: np.ndarray | None, apart: np.ndarray | None = None) -> np.ndarray:
    """int32 [N]: the smallest node that shares a key with each node; the node itself if it has no twin.

    Args:
        keys: [N] each; nodes are twins if any of their keys match, or if they have a twin in common.
        apart: bool [N]: these have no twins, regardless of their keys.
    """
    known = [key for key in keys if key is not None]
    group = np.arange(len(known[0]))
    there = group if apart is None else np.flatnonzero(~apart)
    while len(there):
        before = group.copy()
        for key in known:
            order = there[np.argsort(key[there], kind="stable")]
            first = np.flatnonzero(np.append(True, np.diff(key[order].astype(np.int64)) != 0))
            least = np.minimum.reduceat(group[order], first)
            group[order] = np.repeat(least, np.diff(np.append(first, len(order))))
        if (group == before).all():
            break
    return group.astype(np.int32)


def row_keys(x_ND: np.ndarray) -> np.ndarray:
    """uint64 [N]: equal for equal rows of a float16 array, and almost never for different rows."""
    odd = np.random.default_rng(SEED).integers(0, 2**63, x_ND.shape[1], np.uint64) * 2 + 1
    keys = np.empty(len(x_ND), np.uint64)
    for start in range(0, len(x_ND), ROWS):
        rows = np.ascontiguousarray(x_ND[start : start + ROWS]).view(np.uint16)
        keys[start : start + ROWS] = (rows.astype(np.uint64) * odd).sum(1, dtype=np.uint64)
    return keys


def summary(twin_N: np.ndarray) -> dict[str, int]:
    """Count the nodes with a twin, and the nodes of the largest group (1: there are no twins)."""
    sizes = np.bincount(twin_N, minlength=len(twin_N))
    return {"nodes": int(sizes[sizes > 1].sum()), "most": int(sizes.max(initial=1))}
