"""Quality of a neighbor table: homophily, degrees, recall."""

from __future__ import annotations

from typing import Any

import numpy as np


def edge_homophily(
    table_NM: np.ndarray, labels_N: np.ndarray, weights_NM: np.ndarray | None = None
) -> float:
    """Fraction of edges whose two ends have the same label; unknown labels and empty cells don't count.

    With ``weights_NM``, the fraction of the total weight.
    """
    there = (table_NM >= 0) & (labels_N[:, None] >= 0) & (labels_N[table_NM] >= 0)
    same = (labels_N[table_NM] == labels_N[:, None]) & there
    if weights_NM is None:
        return float(same.sum() / max(there.sum(), 1))
    whole = float(weights_NM[there].sum())
    return float(weights_NM[same].sum()) / whole if whole > 0 else 0.0


def degree_stats(table_NM: np.ndarray) -> dict[str, Any]:
    """In-degrees: min, median, mean, max, and a histogram over powers of two."""
    degree = np.bincount(table_NM[table_NM >= 0], minlength=len(table_NM))
    edges = np.concatenate([[0, 1], 2 ** np.arange(1, 2 + int(np.log2(max(degree.max(), 1))))])
    counts, _ = np.histogram(degree, bins=np.append(edges, degree.max() + 1 + edges[-1]))
    return {
        "min": int(degree.min()),
        "median": float(np.median(degree)),
        "mean": float(degree.mean()),
        "max": int(degree.max()),
        "histogram": {"from": edges.tolist(), "nodes": counts.tolist()},
    }


def recall(table_NM: np.ndarray, reference_NM: np.ndarray) -> float:
    """Fraction of the reference's neighbors that the table has, row by row; empty cells don't count."""
    there = reference_NM >= 0
    hits = (reference_NM[:, :, None] == table_NM[:, None, :]).any(2) & there
    return float(hits.sum() / max(there.sum(), 1))


def changed_edges(before_NM: np.ndarray, after_NM: np.ndarray, most: int = 65_536) -> float:
    """Fraction of a table's edges that are not in the previous table, over at most ``most`` rows."""
    rows = np.arange(0, len(after_NM), -(-len(after_NM) // most))
    before, after = before_NM[rows], after_NM[rows]
    there = after >= 0
    known = (after[:, :, None] == before[:, None, :]).any(2)
    return float((there & ~known).sum() / max(there.sum(), 1))
