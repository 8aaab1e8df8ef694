"""Two-layer GNNs over the same graph: ours in three ways, DGL's and PyTorch Geometric's as users write them.

A contender is built from the arrays of a graph and the nodes of a rank's partition; it provides the module to
train, and batches of (loss, bytes of features gathered, fraction of remote nodes). All have D = 128 → 128 →
1000 classes, fan-out [10, 10] and batches of 512 seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from free_ports import free_port
from torch import Tensor, nn

CLASSES, DIM, HIDDEN, PROJECTION, BATCH, FANOUT, K = 1000, 128, 128, 64, 512, 10, 10
ROW = DIM * 2 + PROJECTION * 4
"""Bytes of x and z of a node."""


@dataclass
class Arrays:
    """A graph: x float16 [N, D], z [N, d], labels, candidates [N, M], part [N]; memory-mapped."""

    folder: Path
    x: np.ndarray
    z: np.ndarray
    labels: np.ndarray
    candidates: np.ndarray
    part: np.ndarray


@dataclass
class Step:
    """One batch, ready for training."""

    loss: Callable[[nn.Module], Tensor]
    feature_bytes: int
    remote: float


@dataclass
class Contender:
    """A module and its endless batches; ``halo_bytes`` are fetched once per refresh."""

    module: nn.Module
    batches: Iterator[Step]
    halo_bytes: int = 0


def make(name: str, arrays: Arrays, rank: int) -> Contender:
    """A contender by name."""
    torch.manual_seed(0)
    if name.startswith("ours"):
        _, sampler, hop = name.split("-")
        return _ours(arrays, rank, sampler, hop)
    return {"dgl": _dgl, "pyg": _pyg}[name](arrays, rank)


def _seeds(arrays: Arrays, rank: int) -> Iterator[np.ndarray]:
    own, epoch = np.flatnonzero(np.asarray(arrays.part) == rank), 0
    while True:
        shuffled = np.random.default_rng([epoch, rank]).permutation(own)
        yield from shuffled[: len(own) // BATCH * BATCH].reshape(-1, BATCH)
        epoch += 1


def _ours(arrays: Arrays, rank: int, sampler_name: str, hop_name: str) -> Contender:
    from cnn2gnn_dist.graph.bank import Bank
    from cnn2gnn_dist.graph.partition import parts
    from cnn2gnn_dist.graph.sampler import make_sampler
    from cnn2gnn_dist.stages.neighbours.second_hop import CachedSecondHop

    if sampler_name == "distdgl":
        served = _served(arrays, rank)
        return Contender(_student(), _steps(arrays, rank, served, served, None))
    graph = parts.build_part(np.asarray(arrays.candidates), np.asarray(arrays.part), rank)
    nodes = graph.nodes_L
    bank = Bank(
        torch.from_numpy(arrays.x[nodes]),
        torch.from_numpy(arrays.z[nodes]),
        torch.from_numpy(arrays.labels[nodes]),
        nodes,
        graph.num_inner,
        graph.table_KM,
    )
    sampler = make_sampler(sampler_name, graph.table_KM, 0, nodes)
    cached = CachedSecondHop(bank, K) if hop_name == "cached" else None
    return Contender(
        _student(),
        _steps(arrays, rank, bank, sampler, cached),
        (len(nodes) - graph.num_inner) * ROW,
    )


def _steps(arrays: Arrays, rank: int, holder: Any, sampler: Any, cached: Any) -> Iterator[Step]:
    """Our steps, for any holder of the rows and any neighbor sampler."""
    from cnn2gnn_dist.graph.block import block_ids
    from cnn2gnn_dist.models.block import averaged_block

    part_N = np.asarray(arrays.part)
    for step, ids in enumerate(_seeds(arrays, rank)):
        seeds = holder.local_of(ids)
        key = {"epoch": 0, "step": step, "rank": rank}
        first = sampler.neighbours(seeds, FANOUT, hop=1, **key)
        if cached is None:
            ids_of = block_ids(sampler, first, seeds, FANOUT, **key)
            nodes, averaged = ids_of.nodes_V, 0
            x_VD, z_Vd, labels_V = holder.rows(nodes)
            named = ("first_U", "row_of_BF", "second_UG", "seed_B")
            indices = {name: torch.from_numpy(getattr(ids_of, name)) for name in named}
            block = averaged_block(x_VD, z_Vd, labels_V.long(), k=K, **indices)
        else:
            block = cached.block(first, seeds)
            nodes, averaged = np.concatenate([first.clip(0).reshape(-1), seeds]), first.size
        x_BD = block.seed_x_BD.float()
        labels = torch.from_numpy(arrays.labels[ids]).long()
        yield Step(
            _loss(x_BD + 0.01 * torch.randn_like(x_BD), block, labels),
            len(nodes) * ROW + averaged * DIM * 2,
            float((part_N[holder.global_of(nodes)] != rank).mean()),
        )


def _served(arrays: Arrays, rank: int) -> Any:
    """DistDGL's servers, one per rank, on loopback."""
    from cnn2gnn_dist.graph.distdgl.served import ServedGraph, Task

    path = arrays.folder / "served" / "v0000"
    if rank == 0 and not path.exists():
        _write_version(arrays, path.parent)
    addresses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(addresses, ("127.0.0.1", free_port()))
    task = Task(str(path), rank, f"{path.parent}/machine{rank}", addresses, 0)
    own = np.flatnonzero(np.asarray(arrays.part) == rank)
    made = ServedGraph(task, own, len(arrays.part), isolated=True, timeout_s=300)
    made.connect()
    return made


def _write_version(arrays: Arrays, root: Path) -> None:
    from cnn2gnn_dist.graph.partition import parts
    from cnn2gnn_dist.graph.version import GraphWriter

    made = {name: getattr(arrays, name) for name in ("x", "z", "labels", "candidates", "part")}
    shapes = {name: (a.shape, a.dtype.type) for name, a in made.items()}
    writer = GraphWriter.create(root, 0, shapes)
    for name, array in made.items():
        writer.rows(name, 0, array)
    table, part_N = np.asarray(arrays.candidates), np.asarray(arrays.part)
    for part in range(int(part_N.max()) + 1):
        parts.build_part(table, part_N, part).save(writer.path / f"part-{part:02d}")
    writer.finalise({})


def _loss(x_BD: Tensor, block: Any, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda module: F.cross_entropy(module(x_BD, block).logits_BC, labels)


def _student() -> nn.Module:
    """Graph head and GNN; in place of the stem's features come those of the bank with a little noise."""
    from cnn2gnn_dist.models.student import Student

    class OnFeatures(Student):
        def embed(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor]:
            assert self.head is not None
            return images_BHWC, self.head(images_BHWC)

    made = OnFeatures(
        nn.Identity(), DIM, PROJECTION, HIDDEN, CLASSES, 0, K, "dataset", (0.0,) * 3, (1.0,) * 3
    )
    assert made.head is not None
    made.head.norm.track_running_stats = True
    return made


class _Sage(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, on_blocks: bool) -> None:
        super().__init__()
        self.first, self.second, self.on_blocks = first, second, on_blocks

    def forward(self, edges: Any, x: Tensor) -> Tensor:
        if self.on_blocks:
            return self.second(edges[1], F.relu(self.first(edges[0], x)))
        return self.second(F.relu(self.first(x, edges)), edges)


def _edges(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Edges from each candidate to the node whose candidate it is."""
    nodes, width = arrays.candidates.shape
    tails = torch.from_numpy(arrays.candidates.astype(np.int64).ravel())
    return tails, torch.arange(nodes).repeat_interleave(width)


def _dgl(arrays: Arrays, rank: int) -> Contender:
    from cnn2gnn_dist.compat import import_dgl

    dgl = import_dgl()
    from dgl.nn.pytorch import SAGEConv

    dgl.utils.set_num_threads(1)
    graph = dgl.graph(_edges(arrays), num_nodes=len(arrays.candidates))
    graph.ndata["x"] = torch.from_numpy(np.asarray(arrays.x, np.float32))
    graph.ndata["label"] = torch.from_numpy(np.asarray(arrays.labels, np.int64))
    graph.create_formats_()
    part = torch.from_numpy(np.array(arrays.part))
    own = torch.nonzero(part == rank).squeeze(1)
    sampler = dgl.dataloading.NeighborSampler(
        [FANOUT, FANOUT], prefetch_node_feats=["x"], prefetch_labels=["label"]
    )
    loader = dgl.dataloading.DataLoader(
        graph, own, sampler, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=0
    )

    def batches() -> Iterator[Step]:
        while True:
            for inputs, _, blocks in loader:
                x, labels = blocks[0].srcdata["x"], blocks[-1].dstdata["label"]
                remote = float((part[inputs] != rank).float().mean())
                yield Step(_plain_loss(blocks, x, labels), x.nbytes, remote)

    module = _Sage(SAGEConv(DIM, HIDDEN, "mean"), SAGEConv(HIDDEN, CLASSES, "mean"), True)
    return Contender(module, batches())


def _pyg(arrays: Arrays, rank: int) -> Contender:
    from torch_geometric.data import Data  # type: ignore[import-not-found]
    from torch_geometric.loader import NeighborLoader  # type: ignore[import-not-found]
    from torch_geometric.nn import SAGEConv  # type: ignore[import-not-found]

    data = Data(
        x=torch.from_numpy(np.asarray(arrays.x, np.float32)),
        edge_index=torch.stack(_edges(arrays)),
        y=torch.from_numpy(np.asarray(arrays.labels, np.int64)),
    )
    part = torch.from_numpy(np.array(arrays.part))
    loader = NeighborLoader(
        data,
        [FANOUT, FANOUT],
        input_nodes=part == rank,
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
    )

    def batches() -> Iterator[Step]:
        while True:
            for batch in loader:
                remote = float((part[batch.n_id] != rank).float().mean())
                yield Step(_pyg_loss(batch), batch.x.nbytes, remote)

    module = _Sage(SAGEConv(DIM, HIDDEN), SAGEConv(HIDDEN, CLASSES), False)
    return Contender(module, batches())


def _plain_loss(blocks: Any, x: Tensor, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda module: F.cross_entropy(module(blocks, x), labels)


def _pyg_loss(batch: Any) -> Callable[[nn.Module], Tensor]:
    return lambda module: F.cross_entropy(
        module(batch.edge_index, batch.x)[: batch.batch_size], batch.y[: batch.batch_size]
    )
