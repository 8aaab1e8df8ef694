"""The candidate rows of an edited memory: which rows an edit changes, and their new contents.

A pure function of the current rows, never of the edits that led to them: adding images and removing
them again restores the previous table, and an edited memory has the table that would be built from its
rows. Shapes: N rows, M candidates, d projection.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cnn2gnn_dist.graph.search.knn import Index

CHUNK, CELLS = 1 << 16, 1 << 24
"""Rows, and similarities of rows to added ones, that are handled at once."""
_SLACK = 8
_MARGIN = 1e-5
"""Added to similarities of unit vectors before they are compared, so that rounding can't hide a row."""


class Rewired(NamedTuple):
    """Rows that differ from the base table: ``ids_K`` int64 ascending; ``rows_KM`` int32, -1 = none."""

    ids_K: np.ndarray
    rows_KM: np.ndarray


def candidates(base_NM: np.ndarray, changed: Rewired, ids: np.ndarray) -> np.ndarray:
    """int32 [n, M]: the candidates of live rows, nearest first; -1 = none."""
    ids = np.asarray(ids)
    count = len(base_NM)
    if count:
        found = np.array(base_NM[ids.clip(max=count - 1)])
    else:  # all images were removed, and the memory compacted, before others were added
        found = np.full((len(ids), base_NM.shape[1]), -1, np.int32)
    place = np.searchsorted(changed.ids_K, ids).clip(max=max(len(changed.ids_K) - 1, 0))
    if len(changed.ids_K):
        hit = changed.ids_K[place] == ids
        found[hit] = changed.rows_KM[place[hit]]
    return found


def rewired(base_NM: np.ndarray, z_Nd: np.ndarray, live_N: np.ndarray) -> Rewired:
    """Find the rows that differ from the base table, and search them exactly.

    Args:
        base_NM: int32, candidates of the first rows when they were written; -1 = none.
        z_Nd: float32 of unit length, of these and of all rows added since.
        live_N: bool, False where a row was removed.
    """
    count, width = base_NM.shape
    added = count + np.flatnonzero(live_N[count:])
    concerned = np.zeros(len(live_N), bool)
    concerned[added] = True
    chunk = min(CHUNK, max(CELLS // max(len(added), 1), 1))
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        table = np.asarray(base_NM[rows])
        lost = ((table >= 0) & ~live_N[table.clip(min=0)]).any(1)
        concerned[rows] = (lost | _reached(table, rows, z_Nd, added)) & live_N[rows]
    ids = np.flatnonzero(concerned)
    return Rewired(ids, nearest_rows(z_Nd, np.flatnonzero(live_N), ids, width))


def without(
    base_NM: np.ndarray, z_Nd: np.ndarray, live_N: np.ndarray, gone_N: np.ndarray
) -> np.ndarray:
    """int32 [rows that stay, M]: the table without some rows, numbered anew.

    Args:
        base_NM: int32, candidates of all rows; -1 = none.
        z_Nd: float32 of unit length.
        live_N: bool, False for rows that are nobody's candidates.
        gone_N: bool, the rows to leave out.
    """
    changed = rewired(base_NM, z_Nd, live_N & ~gone_N)
    table_NM = np.array(base_NM)
    table_NM[changed.ids_K] = changed.rows_KM
    new_N = np.cumsum(~gone_N, dtype=np.int32) - 1
    kept_nM = table_NM[~gone_N]
    return np.where(kept_nM >= 0, new_N[kept_nM.clip(min=0)], -1).astype(np.int32)


def _reached(table: np.ndarray, rows: slice, z_Nd: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Whether an added row is nearer than the last candidate, or a slot is free."""
    if not len(added):
        return np.zeros(len(table), bool)
    z = np.asarray(z_Nd[rows])
    last = np.einsum("nd,nd->n", z, z_Nd[table[:, -1].clip(min=0)])
    near = (z @ z_Nd[added].T).max(1)
    return (table[:, -1] < 0) | (near + _MARGIN >= last)


def nearest_rows(z_Nd: np.ndarray, live: np.ndarray, ids_K: np.ndarray, width: int) -> np.ndarray:
    """int32 [K, width]: the nearest live rows of rows, without themselves; -1 where there are fewer.

    Ordered by squared distance, ties by id.
    """
    found_KM = np.full((len(ids_K), width), -1, np.int32)
    some = min(width, len(live) - 1)
    if some < 1 or not len(ids_K):
        return found_KM
    base = np.ascontiguousarray(z_Nd[live])
    index = Index(base)
    place = np.searchsorted(live, ids_K)
    fetched, _ = index.search(z_Nd[ids_K], min(some + _SLACK, len(live) - 1), exclude=place)
    found_KM[:, :some] = live[by_distance(z_Nd[ids_K], base, fetched)[:, :some]]
    return found_KM


def nearest(z_Nd: np.ndarray, live: np.ndarray, query_Qd: np.ndarray, width: int) -> np.ndarray:
    """int64 [Q, width]: the live rows nearest to projections, without those of images that could not be read (z = 0).

    Ordered by squared distance, ties by id; -1 where there are fewer.
    """
    live = live[z_Nd[live].any(1)]
    base = z_Nd if len(live) == len(z_Nd) else np.ascontiguousarray(z_Nd[live])
    return nearest_of(Index(base), base, live, query_Qd, width)


def nearest_of(
    index: Index, base_nd: np.ndarray, ids_n: np.ndarray, query_Qd: np.ndarray, width: int
) -> np.ndarray:
    """``nearest``, with an index of the projections of these rows."""
    found = np.full((len(query_Qd), width), -1, np.int64)
    some = min(width, len(ids_n))
    if some:
        fetched, _ = index.search(query_Qd, min(some + _SLACK, len(ids_n)))
        found[:, :some] = ids_n[by_distance(query_Qd, base_nd, fetched)[:, :some]]
    return found


def by_distance(query_Qd: np.ndarray, base_Nd: np.ndarray, ids_Qm: np.ndarray) -> np.ndarray:
    """The ids of each row by ascending squared distance, ties by id; computed row by row.

    The order that a search returns depends, in the last bits, on the number of queries.
    """
    apart = (base_Nd[ids_Qm] - query_Qd[:, None]).astype(np.float64)
    order = np.lexsort((ids_Qm, np.square(apart).sum(-1)), axis=1)
    return np.take_along_axis(ids_Qm, order, 1)
