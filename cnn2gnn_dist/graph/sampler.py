"""Neighbor samplers behind one interface: uniform, without replacement, keyed by the step.

The table's sampler is also keyed by the node, whichever rank or partition asks, so its samples do
not change with the world size. DGL's has one random stream per call, so its samples do.

``neighbours(rows, fanout, epoch=, step=, hop=, rank=)`` gives [Q, fanout] local ids, -1 = none;
a fan-out at or above the number of candidates returns all of them. The same key gives the same
sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from cnn2gnn_dist.compat import import_dgl
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.splitmix import GOLDEN, mixed


class Sampler(Protocol):
    """Interface of both samplers. ``num_rows``: nodes with candidates; halo-2 nodes have none."""

    num_rows: int

    def neighbours(
        self, rows: np.ndarray, fanout: int, *, epoch: int, step: int, hop: int, rank: int
    ) -> np.ndarray:
        """[Q, fanout] int64 local ids of sampled candidates of ``rows``; -1 = none.

        In the order of the table. Raises IndexError for a row without candidates.
        """


class TableSampler:
    """Samples columns of the candidate table with numpy.

    ``nodes_K``: the global ids behind the rows; without it the row numbers serve as ids.
    """

    def __init__(self, table_KM: np.ndarray, seed: int, nodes_K: np.ndarray | None = None) -> None:
        self.table_KM, self.seed, self.num_rows = table_KM, seed, len(table_KM)
        nodes = np.arange(len(table_KM)) if nodes_K is None else nodes_K[: len(table_KM)]
        self._nodes_K = np.asarray(nodes, np.uint64)

    def neighbours(
        self, rows: np.ndarray, fanout: int, *, epoch: int, step: int, hop: int, rank: int
    ) -> np.ndarray:
        """See ``Sampler``."""
        candidates = self.table_KM[_checked(rows, self.num_rows)].astype(np.int64)
        width = candidates.shape[1]
        if fanout >= width:
            return candidates
        draw = _draws(sample_key(self.seed, epoch, step, hop), self._nodes_K[rows], width)
        draw[candidates < 0] = np.iinfo(np.uint64).max
        columns = np.argpartition(draw, fanout - 1, axis=1)[:, :fanout]
        columns.sort(axis=1)
        return np.take_along_axis(candidates, columns, 1)


class DglSampler:
    """Samples with DGL's C++ neighbor sampler; also suits graphs of unequal degree."""

    def __init__(self, table_KM: np.ndarray, seed: int) -> None:
        import torch

        self.table_KM, self.seed, self.num_rows = table_KM, seed, len(table_KM)
        self._dgl = import_dgl()
        there = (table_KM >= 0).ravel()
        # Table cell of each edge; None: no empty cells, edge e is cell e.
        self._cells = None if there.all() else np.flatnonzero(there)
        heads = np.repeat(np.arange(len(table_KM)), table_KM.shape[1])[there]
        tails = table_KM.ravel()[there].astype(np.int64)
        nodes = int(max(len(table_KM), table_KM.max(initial=-1) + 1))
        # DGL samples in-edges: the edge runs from the candidate to the node whose candidate it is.
        ends = torch.from_numpy(tails), torch.from_numpy(heads)
        self._graph: Any = self._dgl.graph(ends, num_nodes=nodes)

    def neighbours(
        self, rows: np.ndarray, fanout: int, *, epoch: int, step: int, hop: int, rank: int
    ) -> np.ndarray:
        """See ``Sampler``."""
        import torch

        width = self.table_KM.shape[1]
        fanout = min(fanout, width)
        # DGL aborts the process on a negative id and doesn't merge repeated rows.
        distinct, place = np.unique(_checked(rows, self.num_rows), return_inverse=True)
        with self._one_thread():
            self._dgl.seed(sample_key(self.seed, epoch, step, hop, rank) & 0x7FFFFFFF)
            seeds = torch.from_numpy(distinct)
            frontier = self._dgl.sampling.sample_neighbors(self._graph, seeds, fanout)
        edges = np.sort(frontier.edata[self._dgl.EID].numpy())
        cells = edges if self._cells is None else self._cells[edges]
        row = np.searchsorted(distinct, cells // width)
        column = np.arange(len(row)) - np.searchsorted(row, row, side="left")
        made = np.full((len(distinct), fanout), -1, np.int64)
        made[row, column] = self.table_KM.ravel()[cells]
        return made[place]

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """DGL's random stream is per thread, and depends on the number of threads.

        Torch may share the OpenMP library, so its number of threads is restored.
        """
        threads = self._dgl.utils.get_num_threads()
        self._dgl.utils.set_num_threads(1)
        try:
            yield
        finally:
            self._dgl.utils.set_num_threads(threads)


def make_sampler(
    name: str, table_KM: np.ndarray, seed: int, nodes_K: np.ndarray | None = None
) -> Sampler:
    """Return a sampler by name, "table" or "dgl"; ``nodes_K``: global ids of the rows.

    Raises:
        UserError: unknown name.
    """
    if name == "table":
        return TableSampler(table_KM, seed, nodes_K)
    if name == "dgl":
        return DglSampler(table_KM, seed)
    raise UserError(
        f"unknown sampler {name!r}", where="graph.sampling.sampler", remedy="use table or dgl"
    )


def _checked(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Rows as int64, checked to be in the table."""
    rows = np.asarray(rows, np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= num_rows):
        raise IndexError(f"rows {rows.min()}..{rows.max()} of a table of {num_rows} rows")
    return rows


def _draws(key: int, nodes_Q: np.ndarray, width: int) -> np.ndarray:
    """uint64 [Q, width], random by (key, node, column): splitmix64."""
    columns = np.arange(1, width + 1, dtype=np.uint64) * GOLDEN
    return mixed(mixed(nodes_Q ^ np.uint64(key))[:, None] + columns)


def sample_key(*numbers: int) -> int:
    """A 64-bit key of a step's sample."""
    text = ",".join(str(int(n)) for n in numbers).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
