"""The live query: the nearest nodes to the current projections, in this rank's partitions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cnn2gnn_dist.config import GraphConfig
from cnn2gnn_dist.graph.bank import Bank
from cnn2gnn_dist.graph.search.knn import Index


class LiveSearch:
    """An index over each partition and its first halo, built at the first query.

    Args:
        bank: of the partitions.
        part_N: partition of every node of the graph.
        parts: the partitions; None: all of them, searched as one.
        settings: of the search.
        device: where the search runs.
    """

    def __init__(
        self,
        bank: Bank,
        part_N: np.ndarray,
        parts: list[int] | None,
        settings: GraphConfig,
        device: str,
    ) -> None:
        self.bank, self.settings, self.device = bank, settings, device
        self._part_N, self._parts = part_N, parts or []
        self._searches: list[_Search] | None = None

    @property
    def nodes(self) -> int:
        """Number of rows with candidates here (inner and first halo)."""
        return len(self.bank.table_KM)

    @property
    def flops_per_query(self) -> float:
        """Multiply-adds x 2 of one search; 0 where no node can be found."""
        return next((search.index.flops_per_query for search in self._opened()), 0.0)

    def nearest(self, z_Bd: np.ndarray, wanted: int, seeds_B: np.ndarray) -> np.ndarray:
        """[B, wanted] local ids of the nearest nodes; a seed's are in its own partition and its halo.

        A rank that owns several partitions searches each separately, so that what a seed finds
        does not change with the number of ranks.
        """
        found_BF = np.full((len(seeds_B), wanted), -1, np.int64)
        for search in self._opened():
            rows = search.rows_searching_here(seeds_B)
            if not len(rows):
                continue
            left_out = search.place_of(seeds_B[rows])
            most = min(wanted, search.index.nodes - int((left_out >= 0).any()))
            found, _ = search.index.search(z_Bd[rows], most, exclude=left_out)
            found_BF[rows, :most] = search.local_of(found)
        return found_BF

    def _opened(self) -> list[_Search]:
        if self._searches is None:
            # Corrupt images (z = 0) are no node's neighbors.
            everything = np.flatnonzero(self.bank.z_Ld[: self.nodes].numpy().any(1))
            if len(self._parts) < 2:
                searches = [self._search(everything, None)]
            else:
                inner_part = np.asarray(self._part_N)[self.bank.nodes_L[: self.bank.num_inner]]
                searches = [
                    self._search(
                        np.intersect1d(self._around_part(inner_part == part), everything),
                        inner_part == part,
                    )
                    for part in self._parts
                ]
            # A partition may have images without a label only (data.unlabelled): nothing to find there.
            self._searches = [search for search in searches if len(search.rows_S)]
        return self._searches

    def _around_part(self, inner: np.ndarray) -> np.ndarray:
        """Local ids of a partition's inner nodes and their candidates."""
        own = np.flatnonzero(inner)
        candidates = np.asarray(self.bank.table_KM)[own]
        return np.union1d(own, candidates[candidates >= 0])

    def _search(self, rows_S: np.ndarray, inner: np.ndarray | None) -> _Search:
        s, base = self.settings, self.bank.z_Ld.numpy()
        if len(rows_S) < len(base):  # otherwise all of them, without a copy
            base = base[rows_S]
        return _Search(
            Index(base, exact=s.search.exact, probes=s.search.probes, device=self.device),
            rows_S,
            inner,
        )


@dataclass(frozen=True)
class _Search:
    """An index over some local rows; ``inner``: the inner rows that search here, None: all seeds do."""

    index: Index
    rows_S: np.ndarray
    inner: np.ndarray | None

    def rows_searching_here(self, seeds_B: np.ndarray) -> np.ndarray:
        """Rows of the batch whose seeds search here."""
        if self.inner is None:
            return np.arange(len(seeds_B))
        return np.flatnonzero(self.inner[seeds_B])

    def place_of(self, seeds: np.ndarray) -> np.ndarray:
        """Positions of local ids in this index; -1 for none."""
        place = np.clip(np.searchsorted(self.rows_S, seeds), 0, len(self.rows_S) - 1)
        return np.where(self.rows_S[place] == seeds, place, -1)

    def local_of(self, found: np.ndarray) -> np.ndarray:
        """Local ids of positions in this index; -1 stays -1."""
        return np.where(found >= 0, self.rows_S[found], -1)
