"""Partitioning of graphs too large for METIS: restreamed Fennel, and moves that a refresh justifies.

Fennel (Tsourakakis et al., WSDM 2014) assigns the nodes of a stream, one after the other, to the
partition with the most of their neighbors minus a penalty for its size; restreaming (Nishimura and
Ugander, KDD 2013) repeats this from the result. Here nodes arrive in chunks, similar ones together.

Shapes: N nodes, M candidates, R reverse ones, P partitions, U nodes of a chunk.
"""

from __future__ import annotations

import numpy as np

from cnn2gnn_dist.graph.search import nn_descent
from cnn2gnn_dist.graph.search.work_units import row_ranges

CHUNK = 8192
GAMMA = 1.5
"""Exponent of Fennel's size penalty: between edges only (1) and balance only (2)."""
SLACK = 0.03
"""How much larger than the mean a partition may be; METIS uses the same."""


def assign_streaming(
    table_NM: np.ndarray, order_N: np.ndarray, parts: int, passes: int = 10
) -> np.ndarray:
    """int32 [N] partition of each node; memory: the reversed table in addition to the table.

    Args:
        table_NM: int32 candidates of each node, -1 = none.
        order_N: similar nodes next to each other (``order`` of a graph version). The initial
            partitions are equal ranges of it.
        parts: number of partitions.
        passes: maximum passes over the stream; stops early when hardly any node moves.
    """
    nodes = len(table_NM)
    part_N = np.empty(nodes, np.int32)
    part_N[order_N] = np.arange(nodes, dtype=np.int64) * parts // nodes
    reverse_NR = reversed_table(table_NM)
    sizes_P = np.bincount(part_N, minlength=parts)
    price = table_NM.size * parts ** (GAMMA - 1) / nodes**GAMMA * GAMMA
    for number in range(passes):
        moved = 0
        # Chunks of short ranges from a shuffled stream: neighbors rarely choose at the same time.
        for rows in _chunks(order_N, number):
            score_QP = _neighbours_in(table_NM, reverse_NR, part_N, rows, parts)
            score_QP = score_QP - price * sizes_P ** (GAMMA - 1)
            moved += _move_to_best(rows, score_QP, part_N, sizes_P, (1 + SLACK) * nodes / parts)
        if moved < nodes // 2000:
            break
    return part_N


def refine_partition(
    table_NM: np.ndarray, part_N: np.ndarray, parts: int, least_gain: int
) -> np.ndarray:
    """int32 [N]: an earlier graph's partition map, changed where at least ``least_gain`` edges stop crossing.

    A move has a cost: the node's rows change place, and with them the order of seed nodes.
    """
    part_N = part_N.astype(np.int32).copy()
    reverse_NR = reversed_table(table_NM)
    sizes_P = np.bincount(part_N, minlength=parts)
    most = (1 + SLACK) * len(part_N) / parts
    for rows in _chunks(np.arange(len(part_N)), 0):
        score_QP = _neighbours_in(table_NM, reverse_NR, part_N, rows, parts)
        score_QP[np.arange(len(rows)), part_N[rows]] += least_gain - 1
        _move_to_best(rows, score_QP, part_N, sizes_P, most)
    return part_N


def reversed_table(table_NM: np.ndarray) -> np.ndarray:
    """int32 [N, M]: up to M of the nodes that have each node as a candidate; -1 = none."""
    width = table_NM.shape[1]
    cut = row_ranges(len(table_NM), nn_descent.TARGETS)
    return np.concatenate([nn_descent.reverse(table_NM, span, width) for span in cut])


def _chunks(order_N: np.ndarray, number: int) -> list[np.ndarray]:
    rng = np.random.default_rng([number, len(order_N)])
    pieces = np.array_split(order_N, max(1, len(order_N) // 64))
    shuffled = np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])
    return [shuffled[span] for span in row_ranges(len(shuffled), CHUNK)]


def _neighbours_in(
    table_NM: np.ndarray, reverse_NR: np.ndarray, part_N: np.ndarray, rows: np.ndarray, parts: int
) -> np.ndarray:
    """float [Q, P]: the number of edges, in either direction, from each row into each partition."""
    ends = np.concatenate([table_NM[rows], reverse_NR[rows]], axis=1)
    cell = np.arange(len(rows))[:, None] * parts + part_N[ends]
    counts = np.bincount(cell.ravel(), weights=(ends >= 0).ravel(), minlength=len(rows) * parts)
    return counts.reshape(len(rows), parts)


def _move_to_best(
    rows: np.ndarray, score_QP: np.ndarray, part_N: np.ndarray, sizes_P: np.ndarray, most: float
) -> int:
    """Move rows to their best partition while there is room, largest gain first; return how many moved."""
    own = part_N[rows]
    line = np.arange(len(rows))
    best = score_QP.argmax(1)
    gain = score_QP[line, best] - score_QP[line, own]
    willing = np.flatnonzero(gain > 1e-9)
    willing = willing[np.argsort(-gain[willing], kind="stable")]
    moved = 0
    for part in range(len(sizes_P)):
        coming = willing[best[willing] == part][: max(0, int(most - sizes_P[part]))]
        np.subtract.at(sizes_P, own[coming], 1)
        sizes_P[part] += len(coming)
        part_N[rows[coming]] = part
        moved += len(coming)
    return moved
