"""The student's neighbourhood: the graph of the moment, its partition here, blocks for seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.config import GraphConfig
from cnn2gnn_dist.data.manifest import Manifest
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph import bank as banks
from cnn2gnn_dist.graph.bank import Bank, GraphVersion
from cnn2gnn_dist.graph.block import BlockIds, one_hop_block, queried_block
from cnn2gnn_dist.graph.knn import Index
from cnn2gnn_dist.graph.sampler import make_sampler
from cnn2gnn_dist.models.student import CandidateBlock
from cnn2gnn_dist.stages.context import Context
from cnn2gnn_dist.stages.second_hop import CachedSecondHop


def last_refresh(epoch: int, settings: GraphConfig) -> int | None:
    """The epoch at whose start the graph of ``epoch`` is built; None during warm-up."""
    if epoch < settings.start_epoch:
        return None
    since = epoch - settings.start_epoch
    return settings.start_epoch + since // settings.refresh_epochs * settings.refresh_epochs


def reusable(root: Path, number: int, key: str) -> GraphVersion | None:
    """A whole version of this number, built under this key; None if there is none."""
    path = root / f"v{number:04d}"
    if not (path / "manifest.json").is_file():
        return None
    try:
        version = banks.open_version(path)
    except UserError:
        return None
    return version if version.meta["key"] == key else None


def parts_of(rank: int, world_size: int, parts: int) -> list[int]:
    """The partitions that a rank owns: part p goes to rank p·R // P.

    Raises:
        UserError: fewer partitions than ranks.
    """
    if parts < world_size:
        raise UserError(
            f"{parts} partitions for {world_size} ranks: every rank needs one",
            where="graph.parts",
            remedy=f"graph.parts={world_size} or a multiple of it",
        )
    return [p for p in range(parts) if p * world_size // parts == rank]


class Neighbourhood:
    """Blocks around seeds, from the partitions that this rank owns.

    Args:
        context: for seed, device and graph settings.
        version: the graph.
        own_parts: partitions to hold; None for all of them.
    """

    def __init__(
        self, context: Context, version: GraphVersion, own_parts: list[int] | None
    ) -> None:
        self.settings = context.config.graph
        self.device = context.device
        self.rank = context.ranks.rank
        self.version = version
        self.bank: Bank = banks.load_bank(version, own_parts)
        self.sampler = make_sampler(
            self.settings.sampler, self.bank.table_KM, context.config.seed, self.bank.nodes_L
        )
        self._second = (
            CachedSecondHop(self.bank, self.settings.neighbours)
            if self.settings.second_hop == "cached"
            else None
        )
        self._parts = own_parts or []
        self._searches: list[_Search] | None = None

    @property
    def nodes_searched(self) -> int:
        """Rows that have neighbours of their own here (inner and first halo)."""
        return len(self.bank.table_KM)

    @property
    def flops_per_query(self) -> float:
        """Multiply-adds x 2 of one search."""
        return self._opened()[0].index.flops_per_query

    def nearest(self, z_Bd: np.ndarray, wanted: int, seeds_B: np.ndarray) -> np.ndarray:
        """[B, wanted] local ids of the nearest nodes; a seed's in its own partition and its halo.

        A rank that owns several partitions searches each by itself, so that what a seed finds
        does not change with the number of ranks.
        """
        found_BF = np.full((len(seeds_B), wanted), -1, np.int64)
        for search in self._opened():
            rows = search.concerned(seeds_B)
            if not len(rows):
                continue
            left_out = search.place_of(seeds_B[rows])
            most = min(wanted, search.index.nodes - int((left_out >= 0).any()))
            found, _ = search.index.search(z_Bd[rows], most, exclude=left_out)
            found_BF[rows, :most] = search.local_of(found)
        return found_BF

    def _opened(self) -> list[_Search]:
        if self._searches is None:
            everything = np.arange(self.nodes_searched)
            if len(self._parts) < 2:
                self._searches = [self._search(everything, None)]
            else:
                inner_part = np.asarray(self.version.part)[self.bank.nodes_L[: self.bank.num_inner]]
                self._searches = [
                    self._search(self._around_part(inner_part == part), inner_part == part)
                    for part in self._parts
                ]
        return self._searches

    def _around_part(self, inner: np.ndarray) -> np.ndarray:
        """Local ids of a partition's inner nodes and their candidates."""
        own = np.flatnonzero(inner)
        candidates = np.asarray(self.bank.table_KM)[own]
        return np.union1d(own, candidates[candidates >= 0])

    def _search(self, rows_S: np.ndarray, inner: np.ndarray | None) -> _Search:
        s, base = self.settings, self.bank.z_Ld.numpy()[rows_S]
        return _Search(
            Index(base, exact=s.exact, probes=s.probes, device=self.device), rows_S, inner
        )

    def order(self, manifest: Manifest, *, seed: int, global_batch: int, window: int) -> Order:
        """The order of seeds, a fixed share of every partition in each global batch."""
        part_N = np.asarray(self.version.part)
        parts = [np.flatnonzero(part_N == p) for p in range(self.settings.parts)]
        return Order(
            manifest.shard_sizes, seed=seed, global_batch=global_batch, window=window, parts=parts
        )

    def around(self, ids: np.ndarray, epoch: int, step: int) -> Query:
        """Neighbours of training images, found when the student knows their projections."""
        return Query(self, self.bank.local_of(ids), self.settings.fanouts[1], epoch, step)

    def around_unseen(self, count: int) -> Query:
        """Neighbours of images that are not in the graph; all of the second hop."""
        return Query(self, np.full(count, -1, np.int64), self.bank.table_KM.shape[1], 0, 0)

    def candidates(self, ids: BlockIds) -> CandidateBlock:
        """The model's block: the bank's rows of the block's nodes, on the device."""
        nodes_V = torch.as_tensor(ids.nodes_V)
        bank = self.bank
        block = CandidateBlock(
            x_VD=bank.x_LD[nodes_V],
            z_Vd=bank.z_Ld[nodes_V],
            labels_V=bank.labels_L[nodes_V].long(),
            first_BF=torch.as_tensor(ids.first_BF),
            unique_U=torch.as_tensor(ids.unique_U),
            unique_of_BF=torch.as_tensor(ids.unique_of_BF),
            second_UG=torch.as_tensor(ids.second_UG),
            seed_V=torch.as_tensor(ids.seed_V),
            second=None if self._second is None else self._second.of(ids),
        )
        return block.to(self.device)


@dataclass(frozen=True)
class _Search:
    """An index over some local rows; ``inner``: which inner rows ask here, None: all seeds do."""

    index: Index
    rows_S: np.ndarray
    inner: np.ndarray | None

    def concerned(self, seeds_B: np.ndarray) -> np.ndarray:
        """Rows of the batch whose seeds search here."""
        if self.inner is None:
            return np.arange(len(seeds_B))
        return np.flatnonzero(self.inner[seeds_B])

    def place_of(self, seeds: np.ndarray) -> np.ndarray:
        """Places of local ids in this index; -1 for none."""
        place = np.clip(np.searchsorted(self.rows_S, seeds), 0, len(self.rows_S) - 1)
        return np.where(self.rows_S[place] == seeds, place, -1)

    def local_of(self, found: np.ndarray) -> np.ndarray:
        """Local ids of places in this index; -1 stays."""
        return np.where(found >= 0, self.rows_S[found], -1)


class Query:
    """Called by the student with its live projections; gives the block around the seeds.

    After the call ``first_BF`` holds the global ids of the candidates (-1 = none).
    """

    def __init__(
        self, around: Neighbourhood, seeds_B: np.ndarray, fanout: int, epoch: int, step: int
    ) -> None:
        self.around, self.seeds_B, self.fanout = around, seeds_B, fanout
        self.key = {"epoch": epoch, "step": step, "rank": around.rank}
        self.first_BF = np.empty((0, 0), np.int64)

    def __call__(self, z_Bd: Tensor) -> CandidateBlock:
        """Find or sample the candidates of the seeds, and theirs."""
        around, settings = self.around, self.around.settings
        unseen = bool((self.seeds_B < 0).any())
        if settings.query == "table" and not unseen:
            first_BF = self._sampled()
        else:
            wanted = min(settings.fanouts[0], around.nodes_searched - (0 if unseen else 1))
            z = z_Bd.detach().float().cpu().numpy()
            first_BF = around.nearest(z, wanted, self.seeds_B)
        if settings.second_hop == "cached":
            ids = one_hop_block(first_BF, self.seeds_B)
        else:
            ids = queried_block(around.sampler, first_BF, self.seeds_B, self.fanout, **self.key)
        nodes_L = np.append(np.asarray(around.bank.nodes_L), -1)
        local_V = np.append(np.asarray(ids.nodes_V), len(nodes_L) - 1)
        self.first_BF = nodes_L[local_V[np.asarray(ids.first_BF)]]
        return around.candidates(ids)

    def _sampled(self) -> np.ndarray:
        """[B, F] local ids of candidates from the table of the last refresh."""
        distinct, place = np.unique(self.seeds_B, return_inverse=True)
        fanout = self.around.settings.fanouts[0]
        return self.around.sampler.neighbours(distinct, fanout, hop=1, **self.key)[place]
