"""Neighbors of neighbors: one round of NN-descent over a candidate table (Dong et al., WWW 2011).

Shapes: N nodes, M candidates of each, U rows of a unit, W candidates examined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TARGETS = 1 << 18
"""Nodes whose reverse neighbors are found at once: with position and source, their number fits 63 bits."""
ROWS = 8192
"""Rows joined at once: their candidates, and those rows of z, then fit in the cache."""
NONE = np.int64(0x7FFFFFFF)


@dataclass(frozen=True)
class Width:
    """Limits of a join.

    The numbers of candidates of a row, of rows that have it as a candidate, and of candidates of each
    of those.
    """

    forward: int
    backward: int
    further: int


def joined(
    table_NM: np.ndarray,
    reverse_NR: np.ndarray,
    z_Nd: np.ndarray,
    query_Nd: np.ndarray,
    rows_Q: np.ndarray,
    width: Width,
) -> np.ndarray:
    """[Q, M] int32: the best of each row's candidates, of the rows it is a candidate of, and of theirs.

    Args:
        table_NM: int32 candidates, -1 = none; read-only, so that rows may be processed in any order.
        reverse_NR: ``reverse`` of it: without it, rows that no node links to stay badly connected.
        z_Nd: float32 rows.
        query_Nd: float32 rows; ``query_Nd[i]`` is the query of row i (often z itself).
        rows_Q: nodes to process; several times faster with similar nodes next to each other.
        width: limits of the join.
    """
    out = np.empty((len(rows_Q), table_NM.shape[1]), np.int32)
    for start in range(0, len(rows_Q), ROWS):
        rows = rows_Q[start : start + ROWS]
        own, back = table_NM[rows], reverse_NR[rows][:, : width.backward]
        near = np.concatenate([own[:, : width.forward], back], axis=1)
        further = table_NM[np.maximum(near, 0), : width.further]
        further[near < 0] = -1
        ids = np.concatenate([own, back, further.reshape(len(rows), -1)], axis=1)
        out[start : start + ROWS] = best_of(ids, z_Nd, query_Nd[rows], rows, own.shape[1])
    return out


def reverse(table_NM: np.ndarray, targets: slice, most: int) -> np.ndarray:
    """int32 [targets, most]: the nodes that have each node as a candidate, nearest rank first; -1 = none.

    Raises:
        ValueError: more than ``TARGETS`` of them.
    """
    count = targets.stop - targets.start
    if count > TARGETS:
        raise ValueError(f"{count} targets at once, at most {TARGETS}")
    hit = (table_NM >= targets.start) & (table_NM < targets.stop)
    source, place = np.nonzero(hit)
    target = table_NM[hit].astype(np.int64) - targets.start
    keys = (target << 37) | (np.minimum(place, 63) << 31) | source
    keys.sort()
    target = keys >> 37
    rank = np.arange(len(keys)) - np.searchsorted(target, np.arange(count))[target]
    kept = rank < most
    out = np.full((count, most), -1, np.int32)
    out[target[kept], rank[kept]] = (keys[kept] & 0x7FFFFFFF).astype(np.int32)
    return out


def best_of(
    ids_QW: np.ndarray, z_Nd: np.ndarray, query_Qd: np.ndarray, self_Q: np.ndarray, m: int
) -> np.ndarray:
    """[Q, m] int32: the m nearest among ids (-1 = none, duplicates allowed), nearest first.

    A row's own node is excluded; ties go to the smaller id. Modifies ``ids_QW``.
    """
    ids_QW[ids_QW == self_Q[:, None]] = -1
    ids_QW.sort(axis=1)
    ids_QW[:, 1:][ids_QW[:, 1:] == ids_QW[:, :-1]] = -1
    keys = sort_keys(similarities(ids_QW, z_Nd, query_Qd), ids_QW)
    keys.sort(axis=1)
    return ids_of(keys[:, :m])


def similarities(ids_QW: np.ndarray, z_Nd: np.ndarray, query_Qd: np.ndarray) -> np.ndarray:
    """float32 [Q, W] inner products of each query with its own nodes; -inf where the id is -1.

    Each pair is computed separately, so a pair gives the same number wherever it occurs.
    """
    import faiss

    where = np.ascontiguousarray(ids_QW, np.int64)
    query = np.ascontiguousarray(query_Qd, np.float32)
    base = z_Nd if z_Nd.flags.c_contiguous else np.ascontiguousarray(z_Nd)
    near = np.empty(where.shape, np.float32)
    faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]
        faiss.swig_ptr(near),
        faiss.swig_ptr(query),
        faiss.swig_ptr(base),
        faiss.swig_ptr(where),
        query.shape[1],
        *where.shape,
    )
    near[where < 0] = -np.inf
    return near


def sort_keys(near: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """int64 keys that increase as similarity decreases, then with the id; ids of -1 come last.

    One integer sort (vectorized in numpy) replaces a lexsort of pairs.
    """
    known = np.where(ids < 0, np.float32(-np.inf), near).astype(np.float32, copy=False)
    bits = (known + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of the floats, as integers
    low = np.where(ids < 0, NONE, ids)
    return ((~rising).astype(np.int64) << 32) | low


def ids_of(keys: np.ndarray) -> np.ndarray:
    """int32 ids of keys; -1 for none."""
    ids = keys & 0xFFFFFFFF
    return np.where(ids == NONE, -1, ids).astype(np.int32)
