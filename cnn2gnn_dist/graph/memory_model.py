"""The memory model: bytes of every structure of a graph, from a few numbers.

Counts are exact for arrays; the overhead of libraries (METIS) is fitted to measurements
(docs/scale.md). One is left out, since its size depends on the weights: the averages without a neighbor that
weighs more than 0.75 (``CachedSecondHop.without_HD``). With ``graph.neighbours=1``, where the only neighbor has all
the weight, they are as large as the averages themselves, plus 8 bytes per row; with more neighbors few rows have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cnn2gnn_dist.graph.partition.parts import METIS_CANDIDATES
from cnn2gnn_dist.graph.search.approximate import MOST_PROBES, SCAN_ROWS
from cnn2gnn_dist.graph.search.nn_descent import TARGETS

Place = Literal["disk", "rank", "search", "partitioner", "model"]
HALOS = {1: (0.0, 0.0), 2: (0.25, 0.43), 4: (0.52, 1.16), 8: (0.79, 2.25)}
"""First and second halo nodes per inner node, at homophily 0.65 (docs/scale.md)."""
METIS_PROCESS, METIS_EDGE = 0.45 * 2**30, 106
"""Bytes of a process with torch and DGL, and bytes per candidate passed to METIS."""

THUMBNAIL, THUMBNAILS_UP_TO, KEY = 2_000, 200_000, 24
"""Bytes of a photograph of 64 x 64 as JPEG, images of a model that has them, bytes of a key in Parquet."""


@dataclass(frozen=True)
class Sizes:
    """Input of a memory plan.

    Attributes:
        images: N; dim: D of the features; graph_dim: d of the projections; candidates: M.
        parts: P, spread evenly over ``ranks``.
        halo1, halo2: nodes of each halo per inner node.
        searched: the bank's projections are searched live (``graph.sampling.query=live``).
        averaged: the second hop is averaged once (``graph.sampling.second_hop=cached``), and rows of the
            second halo are not held.
    """

    images: int
    dim: int = 128
    graph_dim: int = 64
    candidates: int = 20
    parts: int = 8
    ranks: int = 8
    halo1: float = 0.0
    halo2: float = 0.0
    searched: bool = False
    averaged: bool = False


@dataclass(frozen=True)
class Structure:
    """One array, or several of a kind: its location and size."""

    place: Place
    name: str
    bytes: float


def halos(parts: int) -> tuple[float, float]:
    """Halo nodes per inner node, interpolated and extrapolated from the measured numbers of partitions.

    They grow with the logarithm of the number of partitions, up to all other nodes.
    """
    known = sorted(HALOS)
    above = next((p for p in known if p >= parts), known[-1])
    below = known[max(0, known.index(above) - 1)]
    share = math.log2(parts / below) / math.log2(above / below) if above != below else 0.0
    first, second = (
        low + share * (high - low) for low, high in zip(HALOS[below], HALOS[above], strict=True)
    )
    first = min(first, parts - 1.0)
    return first, min(second, parts - 1.0 - first)


def structures(s: Sizes) -> list[Structure]:
    """Every structure of a version on disk, of a rank in training, of the search, and of METIS."""
    n, m, d = s.images, s.candidates, s.graph_dim
    inner = n / s.ranks
    rows, nodes = inner * (1 + s.halo1), inner * (1 + s.halo1 + s.halo2)
    held = rows if s.averaged else nodes
    parts = s.ranks * (4 * nodes + 4 * m * rows)
    unit = min(n, SCAN_ROWS)
    return [
        Structure("disk", "x, features, float16", 2 * n * s.dim),
        Structure("disk", "z, projections, float32", 4 * n * d),
        Structure("disk", "candidates, int32", 4 * n * m),
        Structure("disk", "labels, parts, order, twins, int32", 16 * n),
        Structure("disk", "partitions: ids and tables, int32", parts),
        Structure("rank", "x of inner and halo nodes, float16", 2 * held * s.dim),
        Structure("rank", "z of inner and halo nodes, float32", 4 * held * d),
        Structure("rank", "labels and ids, int32", 4 * held + 4 * nodes),
        *([Structure("rank", "averages of the second hop, float16", 2 * rows * s.dim)] if s.averaged else []),
        *([Structure("rank", "weights of the second hop, float32", 4 * m * rows)] if s.averaged else []),
        Structure("rank", "candidates as local ids, int32 (mapped)", 4 * m * rows),
        Structure("rank", "sampler: ids behind rows, uint64", 8 * rows),
        *([Structure("rank", "index of z for live search", 8 * d * rows)] if s.searched else []),
        Structure("search", "z (mapped)", 4 * n * d),
        Structure("search", "table before and after (mapped)", 8 * n * m),
        Structure("search", "reverse neighbors (mapped)", 4 * n * (m // 2)),
        Structure("search", "lists of each node (mapped)", 4 * n * (2 + MOST_PROBES / 2)),
        Structure("search", "a unit's keys", 16 * unit * MOST_PROBES / 2 * (m + 1)),
        Structure("search", "reverse edges of a unit", 40 * min(n, TARGETS) * m),
        Structure("partitioner", "METIS through DGL", METIS_PROCESS + METIS_EDGE * n * min(m, METIS_CANDIDATES)),
        Structure("model", "x, features, float16", 2 * n * s.dim),
        Structure("model", "z, projections, float32", 4 * n * d),
        Structure("model", "candidates and labels, int32", 4 * n * (m + 1)),
        Structure("model", "keys and thumbnails", n * (KEY + THUMBNAIL * (n <= THUMBNAILS_UP_TO))),
        Structure("partitioner", "or streaming: table and its reverse", 8 * n * m + 8 * n),
    ]  # fmt: skip


def total(found: list[Structure], place: Place) -> float:
    """Bytes of all structures in one place."""
    return sum(one.bytes for one in found if one.place == place)
