"""One training step is the same step on one, two or four partitions, in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnn2gnn_dist.graph.bank import Bank as GraphBank
from cnn2gnn_dist.graph.block import block_ids
from cnn2gnn_dist.graph.partition import parts as partition
from cnn2gnn_dist.graph.sampler import make_sampler
from cnn2gnn_dist.stages.neighbours.second_hop import CachedSecondHop
from tests.support.blocks import sampled_block
from tests.unit.models.test_student import Bank, K, M, N, make_images, student
from tests.unit.models.test_student_model import KEY, with_features

SEEDS = np.arange(0, N, 2)


def step(part_N: np.ndarray, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, summed over partitions with their own seeds and halos."""
    bank, made = Bank(), student("dataset").eval()  # BatchNorm would use each partition's moments
    table = bank.table_NM.numpy().astype(np.int32)
    images, total = make_images(len(SEEDS)), 0.0
    for number in range(int(part_N.max()) + 1):
        graph = partition.build_part(table, part_N, number)
        own = np.flatnonzero(part_N[SEEDS] == number)
        local = np.searchsorted(graph.nodes_L[: graph.num_inner], SEEDS[own])
        sampler = make_sampler(kind, graph.table_KM, 0, graph.nodes_L)
        ids = sampled_block(sampler, local, (M, M), **KEY)
        out = made(images[own], with_features(bank, ids, graph.nodes_L))
        loss = F.cross_entropy(
            out.logits_BC, bank.labels_N[SEEDS[own]].clamp(min=0), reduction="sum"
        )
        (loss / len(SEEDS)).backward()
        total += float(loss.detach()) / len(SEEDS)
    gradients = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    return total, gradients


@functools.cache
def whole_step() -> tuple[float, dict[str, torch.Tensor]]:
    return step(np.zeros(N, np.int32), "table")


@functools.cache  # METIS runs in a process of its own
def assigned(how: str, parts: int) -> np.ndarray:
    table = Bank().table_NM.numpy().astype(np.int32)
    if how == "ranges":
        return partition.assign_ranges(table, parts)
    if how == "metis":
        return partition.assign(table, parts)
    rng = np.random.default_rng(parts)
    return rng.permutation(np.arange(N) % parts).astype(np.int32)


@pytest.mark.parametrize("kind", ["table", "dgl"])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("how", ["ranges", "random", "metis"])
def test_loss_and_gradients_do_not_know_the_partitions(kind: str, parts: int, how: str) -> None:
    loss, gradients = whole_step()
    got, other = step(assigned(how, parts), kind)
    assert got == pytest.approx(loss, rel=1e-13)
    assert set(other) == set(gradients)
    assert float(gradients["gnn.neighbour1.weight"].abs().max()) > 1e-6
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-11, atol=1e-14, msg=name)


@pytest.mark.parametrize("parts", [1, 3])
def test_both_samplers_know_the_same_neighbours(parts: int) -> None:
    rng = np.random.default_rng(7)
    table = rng.integers(-1, 300, (300, 9)).astype(np.int32)
    table[table == np.arange(300)[:, None]] = -1
    table = np.sort(table, axis=1)
    table[:, 1:][table[:, 1:] == table[:, :-1]] = -1
    part_N = np.arange(300) % parts
    for number in range(parts):
        graph = partition.build_part(table, part_N.astype(np.int32), number)
        rows = np.arange(len(graph.table_KM))
        found = [
            make_sampler(kind, graph.table_KM, 0, graph.nodes_L).neighbours(
                rows, 9, epoch=0, step=0, hop=1, rank=0
            )
            for kind in ("table", "dgl")
        ]
        for row, mine, theirs in zip(rows, *found, strict=True):
            neighbours = set(table[graph.nodes_L[row]].tolist()) - {-1}
            assert {int(graph.nodes_L[i]) for i in mine if i >= 0} == neighbours
            assert {int(graph.nodes_L[i]) for i in theirs if i >= 0} == neighbours


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_cached_second_hop_is_the_sampled_one_at_full_fanout(parts: int) -> None:
    bank, table = Bank(), Bank().table_NM.numpy().astype(np.int32)
    part_N = assigned("random", parts)
    for number in range(parts):
        graph = partition.build_part(table, part_N, number)
        held = GraphBank(
            bank.x_ND[graph.nodes_L],
            bank.z_Nd[graph.nodes_L],
            bank.labels_N[graph.nodes_L],
            graph.nodes_L,
            graph.num_inner,
            graph.table_KM,
        )
        hop = CachedSecondHop(held, K, torch.float64)
        sampler = make_sampler("table", graph.table_KM, 0, graph.nodes_L)
        # Training seeds, and, with -1, images that are not in the graph.
        for seeds in (np.arange(graph.num_inner), np.array([-1, 0, -1, 2])):
            known = np.maximum(seeds, 0)
            first = sampler.neighbours(known, M, hop=1, **KEY)
            first[seeds < 0] = np.arange(M)
            images = make_images(len(seeds))
            full, cached = student("dataset"), student("dataset")
            ids = block_ids(sampler, first, seeds, M, **KEY)
            out = full(images, with_features(bank, ids, graph.nodes_L))
            got = cached(images, hop.block(first, seeds))
            torch.testing.assert_close(got.logits_BC, out.logits_BC, rtol=1e-11, atol=1e-12)
            got.logits_BC.square().sum().backward()
            out.logits_BC.square().sum().backward()
            for (name, mine), other in zip(
                cached.named_parameters(), full.parameters(), strict=True
            ):
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-11, msg=name)
