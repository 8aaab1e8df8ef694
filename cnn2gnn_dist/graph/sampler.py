"""Neighbour samplers behind one interface: uniform, without replacement, keyed by the step.

``neighbours(rows, fanout, epoch=, step=, hop=, rank=)`` gives [U, fanout] local ids, -1 = none;
a fan-out of all candidates or more gives them all. The same key gives the same sample.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np

from cnn2gnn_dist.compat import import_dgl
from cnn2gnn_dist.errors import UserError


class Sampler(Protocol):
    """What both samplers offer."""

    def neighbours(
        self, rows: np.ndarray, fanout: int, *, epoch: int, step: int, hop: int, rank: int
    ) -> np.ndarray:
        """[U, fanout] int64 local ids of sampled candidates of ``rows``; -1 = none."""


class TableSampler:
    """Samples columns of the candidate table with numpy."""

    def __init__(self, table_KM: np.ndarray, seed: int) -> None:
        self.table_KM, self.seed = table_KM, seed

    def neighbours(
        self, rows: np.ndarray, fanout: int, *, epoch: int, step: int, hop: int, rank: int
    ) -> np.ndarray:
        """See ``Sampler``."""
        candidates = self.table_KM[rows].astype(np.int64)
        width = candidates.shape[1]
        if fanout >= width:
            return candidates
        rng = np.random.Generator(np.random.Philox(key=_hash(self.seed, epoch, step, hop, rank)))
        draw = rng.random(candidates.shape, dtype=np.float32)
        draw[candidates < 0] = 2.0
        columns = np.argpartition(draw, fanout - 1, axis=1)[:, :fanout]
        columns.sort(axis=1)
        return np.take_along_axis(candidates, columns, 1)


class DglSampler:
    """Samples with DGL's C++ neighbour sampler; also fit for graphs of unequal degree."""

    def __init__(self, table_KM: np.ndarray, seed: int) -> None:
        import torch

        self.seed, self.width = seed, table_KM.shape[1]
        self._dgl = import_dgl()
        there = table_KM >= 0
        heads = np.repeat(np.arange(len(table_KM)), self.width)[there.ravel()]
        tails = table_KM[there].astype(np.int64)
        nodes = int(max(len(table_KM), table_KM.max(initial=-1) + 1))
        # DGL samples in-edges: the edge runs from the candidate to the node that has it.
        ends = torch.from_numpy(tails), torch.from_numpy(heads)
        self._graph: Any = self._dgl.graph(ends, num_nodes=nodes)

    def neighbours(
        self, rows: np.ndarray, fanout: int, *, epoch: int, step: int, hop: int, rank: int
    ) -> np.ndarray:
        """See ``Sampler``."""
        import torch

        fanout = min(fanout, self.width)
        # DGL's random stream belongs to the thread: seed it in this one, before each call.
        self._dgl.seed(_hash(self.seed, epoch, step, hop, rank) & 0x7FFFFFFF)
        seeds = torch.from_numpy(np.asarray(rows, np.int64))
        frontier = self._dgl.sampling.sample_neighbors(self._graph, seeds, fanout)
        sources, heads = (end.numpy() for end in frontier.edges(order="eid"))
        return _rows_of(sources, heads, np.asarray(rows, np.int64), fanout)


def make_sampler(name: str, table_KM: np.ndarray, seed: int) -> Sampler:
    """ "table" or "dgl".

    Raises:
        UserError: another name.
    """
    if name == "table":
        return TableSampler(table_KM, seed)
    if name == "dgl":
        return DglSampler(table_KM, seed)
    raise UserError(f"no sampler {name!r}", where="graph.sampler", remedy="table or dgl")


def _rows_of(sources: np.ndarray, heads: np.ndarray, rows: np.ndarray, fanout: int) -> np.ndarray:
    """Edges as a padded table [len(rows), fanout], each row ascending."""
    place = np.empty(int(rows.max(initial=0)) + 1, np.int64)
    place[rows] = np.arange(len(rows))
    row = place[heads]
    order = np.lexsort((sources, row))
    row, sources = row[order], sources[order]
    column = np.arange(len(row)) - np.searchsorted(row, row, side="left")
    made = np.full((len(rows), fanout), -1, np.int64)
    made[row, column] = sources
    return made


def _hash(*numbers: int) -> int:
    """64 bits that name a step's sample."""
    text = ",".join(str(int(n)) for n in numbers).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
