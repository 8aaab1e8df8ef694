"""Partitions of nodes without edges, which follow the nodes that they resemble, within the partitioners' balance.

Shapes: N nodes, K nearest nodes, P partitions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from cnn2gnn_dist.graph.partition.fennel import SLACK


class Nearest(NamedTuple):
    """The nodes with edges that each node resembles.

    Attributes:
        ids_NK: int32, nearest first, -1 = none; a node with edges has itself first.
        similarity_N: float32, of the first.
    """

    ids_NK: np.ndarray
    similarity_N: np.ndarray


def follow(part_N: np.ndarray, nearest: Nearest, parts: int) -> np.ndarray:
    """int32 [N]: partitions also of the nodes that have none, each that of the nearest node with room in its own.

    No partition grows beyond the partitioners' slack (one that is larger stays as it is), because a rank's share of a
    batch is that of its partitions. Most similar nodes choose first; those left over go where there are fewest. Neither
    depends on the ranks.

    Args:
        part_N: partitions of the nodes with edges; -1 = none.
        nearest: with edges, for the others.
        parts: number of partitions.
    """
    part_N = part_N.astype(np.int32)
    sizes_P = np.bincount(part_N[part_N >= 0], minlength=parts)
    most = math.ceil((1 + SLACK) * len(part_N) / parts)
    left = np.flatnonzero(part_N < 0)
    left = left[np.argsort(-nearest.similarity_N[left], kind="stable")]
    for near_N in nearest.ids_NK.T:
        near = near_N[left]
        wanted = np.where(near >= 0, part_N[near], -1)
        for part in range(parts):
            coming = left[wanted == part][: max(0, most - sizes_P[part])]
            part_N[coming] = part
            sizes_P[part] += len(coming)
        left = left[part_N[left] < 0]
    rooms_P = np.maximum(most - sizes_P, 0)
    level = np.concatenate(
        [np.arange(size, size + room) for size, room in zip(sizes_P, rooms_P, strict=True)]
    )
    lowest = np.argsort(level, kind="stable")[: len(left)]
    part_N[left] = np.repeat(np.arange(parts), rooms_P)[lowest]
    return part_N
