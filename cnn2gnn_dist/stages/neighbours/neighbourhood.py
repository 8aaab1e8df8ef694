"""The student's neighborhood: the current graph, this rank's partitions, blocks for seed nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.config import GraphConfig
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.bank import Rows, load_bank
from cnn2gnn_dist.graph.block import block_ids, sampled_first_hop, without_seed
from cnn2gnn_dist.graph.distdgl.served import ServedGraph
from cnn2gnn_dist.graph.sampler import Sampler, make_sampler
from cnn2gnn_dist.graph.version import (
    MANIFEST,
    GraphVersion,
    checksums,
    open_version,
    version_path,
)
from cnn2gnn_dist.models.block import Block, averaged_block
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.shared_files import handover
from cnn2gnn_dist.stages.neighbours.live_search import LiveSearch
from cnn2gnn_dist.stages.neighbours.second_hop import CachedSecondHop
from cnn2gnn_dist.stages.shared.context import Context


def last_refresh(epoch: int, settings: GraphConfig) -> int | None:
    """The epoch at whose start the graph of ``epoch`` is built; None during warm-up."""
    if epoch < settings.start_epoch:
        return None
    since = epoch - settings.start_epoch
    return settings.start_epoch + since // settings.refresh_epochs * settings.refresh_epochs


def reusable(root: Path, number: int, key: str) -> GraphVersion | None:
    """Return a complete version of this number built under this key, or None (collective).

    Rank 0 checks: hosts that see different states of a folder must not diverge here.
    """
    path = version_path(root, number)

    def look() -> bool:
        if not (path / MANIFEST).is_file():
            return False
        try:
            return open_version(path).meta["key"] == key
        except UserError:
            return False

    return opened(path) if collectives.alone(look) else None


def opened(path: Path) -> GraphVersion:
    """Open a complete version once all hosts see it as it was written (collective).

    Raises:
        UserError: a host does not, or the version is incomplete (on every rank).
    """

    def files() -> dict[str, handover.Written]:
        listed = {name: handover.Written(*one) for name, one in checksums(path).items()}
        return listed | handover.described(path, {MANIFEST: True})

    handover.hand_over(path, files)
    return open_version(path)


class Neighbourhood:
    """Blocks around seeds, from the partitions that this rank owns.

    Args:
        context: for seed, device and graph settings.
        version: the graph.
        own_parts: partitions to hold; None for all of them.
        served: DGL's servers, if they hold the graph instead of this rank.
    """

    def __init__(
        self,
        context: Context,
        version: GraphVersion,
        own_parts: list[int] | None,
        served: ServedGraph | None = None,
    ) -> None:
        self.settings = context.config.graph
        self.device = context.device
        self.rank = context.ranks.rank
        self.version = version
        # Versions from before twins were introduced have none recorded.
        self.twins: dict[str, int] = version.meta.get("search", {}).get("twins", {})
        self.search: LiveSearch | None = None
        self.second: CachedSecondHop | None = None
        self.holder: Rows
        self.sampler: Sampler
        if served is not None:
            self.holder = self.sampler = served
            return
        sampling = self.settings.sampling
        cached = sampling.second_hop == "cached"
        bank = load_bank(version, own_parts, second_halo=not cached)
        name = "table" if sampling.sampler == "distdgl" else sampling.sampler
        self.holder = bank
        self.sampler = make_sampler(name, bank.table_KM, context.config.seed, bank.nodes_L)
        self.search = LiveSearch(bank, version.part, own_parts, self.settings, self.device)
        if cached:
            everyone = None if own_parts is None else load_bank(version)
            self.second = CachedSecondHop(bank, self.settings.neighbours, everyone=everyone)

    @property
    def flops_per_query(self) -> float:
        """Multiply-adds x 2 of one search."""
        assert self.search is not None
        return self.search.flops_per_query

    def order(self, manifest: Manifest, *, seed: int, global_batch: int, window: int) -> Order:
        """The order of seed nodes, a fixed share of every partition in each global batch."""
        part_N = np.asarray(self.version.part)
        parts = [np.flatnonzero(part_N == p) for p in range(self.settings.partition.parts)]
        return Order(
            manifest.shard_sizes, seed=seed, global_batch=global_batch, window=window, parts=parts
        )

    def around(self, ids: np.ndarray, epoch: int, step: int) -> Query:
        """Neighbors of training images, found once the student knows their projections."""
        return Query(
            self, self.holder.local_of(ids), self.settings.sampling.fanouts[1], epoch, step
        )

    def around_unseen(self, count: int) -> Query:
        """Neighbors of images that are not in the graph; with the full second hop."""
        return Query(self, np.full(count, -1, np.int64), self.settings.candidates, 0, 0)

    @property
    def spare(self) -> int:
        """How many of a seed's nearest nodes may be its twins."""
        return self.twins.get("most", 1) - 1

    def without_twins(self, first_BF: np.ndarray, seeds_B: np.ndarray, wanted: int) -> np.ndarray:
        """The first ``wanted`` candidates (local ids, -1 = none) that are not the seed's own image.

        A twin in the bank has the seed's label. An unseen image (-1) may see all: it is in no bank.
        """
        if self.spare:
            twin_BF = self._twin_of(first_BF)
            same = (twin_BF == self._twin_of(seeds_B)[:, None]) & (twin_BF >= 0)
            first_BF = np.where(same, -1, first_BF)
            if first_BF.shape[1] > wanted:  # the remaining ones move up
                order = np.argsort(first_BF < 0, axis=1, kind="stable")
                first_BF = np.take_along_axis(first_BF, order, 1)
        return first_BF[:, :wanted]

    def _twin_of(self, local: np.ndarray) -> np.ndarray:
        """Global id of the first of a node's twins; -1 stays -1."""
        ids = np.asarray(self.holder.global_of(local))
        return np.where(ids >= 0, np.asarray(self.version.twin[np.maximum(ids, 0)]), -1)


class Query:
    """The ``models.block.BlockQuery`` of a batch: the student's live projections → its block.

    After :meth:`block` ``first_BF`` holds the global ids of the candidates (-1 = none).
    """

    def __init__(
        self, around: Neighbourhood, seeds_B: np.ndarray, fanout: int, epoch: int, step: int
    ) -> None:
        self.around, self.seeds_B, self.fanout = around, seeds_B, fanout
        self.key = {"epoch": epoch, "step": step, "rank": around.rank}
        self.first_BF = np.empty((0, 0), np.int64)

    def block(self, z_Bd: Tensor) -> Block:
        """Find or sample the candidates of the seeds, and the candidates' own candidates."""
        around = self.around
        first_BF = without_seed(self._first_hop(z_Bd), self.seeds_B)
        self.first_BF = around.holder.global_of(first_BF)
        if around.second is not None:
            return around.second.block(first_BF, self.seeds_B)
        return self._sampled_block(first_BF, z_Bd.dtype)

    def _first_hop(self, z_Bd: Tensor) -> np.ndarray:
        """[B, F] local ids of the seeds' candidates, -1 = none: searched live, or from the table."""
        around, settings = self.around, self.around.settings.sampling
        unseen = bool((self.seeds_B < 0).any())
        if settings.query == "table" and not unseen:
            wanted = settings.fanouts[0]
            first_BF = sampled_first_hop(around.sampler, self.seeds_B, wanted, **self.key)
        else:
            assert around.search is not None
            wanted = min(settings.fanouts[0], around.search.nodes - (0 if unseen else 1))
            z = z_Bd.detach().float().cpu().numpy()
            spare = 0 if unseen else min(around.spare, settings.fanouts[0])
            first_BF = around.search.nearest(z, wanted + spare, self.seeds_B)
        return around.without_twins(first_BF, self.seeds_B, wanted)

    def _sampled_block(self, first_BF: np.ndarray, dtype: torch.dtype) -> Block:
        """Sample the second hop, and average it on the device."""
        around = self.around
        ids = block_ids(around.sampler, first_BF, self.seeds_B, self.fanout, **self.key)
        x_VD, z_Vd, labels_V = around.holder.rows(ids.nodes_V)

        def there(values: Tensor | np.ndarray) -> Tensor:
            return torch.as_tensor(values).to(around.device, non_blocking=True)

        return averaged_block(
            there(x_VD),
            there(z_Vd).to(dtype),
            there(labels_V.long()),
            first_U=there(ids.first_U),
            row_of_BF=there(ids.row_of_BF),
            second_UG=there(ids.second_UG),
            seed_B=there(ids.seed_B),
            k=around.settings.neighbours,
        )
