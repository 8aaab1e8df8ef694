"""The live search against brute force: which nodes a seed may find, and which are nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnn2gnn_dist.config import GraphConfig
from cnn2gnn_dist.graph.bank import Bank
from cnn2gnn_dist.graph.partition import parts as partition
from cnn2gnn_dist.stages.neighbours.live_search import LiveSearch, _Search
from tests.support.graphs import random_table

N, D, M, PARTS = 90, 5, 6, 3


def graph() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors z [N, D], a random table [N, M], parts [N] of unequal size."""
    rng = np.random.default_rng(4)
    z = rng.normal(size=(N, D)).astype(np.float32)
    part = rng.choice(PARTS, N, p=[0.5, 0.3, 0.2]).astype(np.int32)
    return z / np.linalg.norm(z, axis=1, keepdims=True), random_table(N, M, 2), part


def bank_of(parts: list[int] | None) -> Bank:
    z, table, part = graph()
    inner = np.arange(N) if parts is None else np.flatnonzero(np.isin(part, parts))
    held = partition.build_union(table, inner)
    nodes = held.nodes_L
    return Bank(
        torch.zeros(len(nodes), 2, dtype=torch.float16),
        torch.from_numpy(z[nodes]),
        torch.zeros(len(nodes), dtype=torch.int32),
        nodes,
        held.num_inner,
        held.table_KM,
    )


def found_by(parts: list[int] | None, seeds: np.ndarray, query: np.ndarray, wanted: int):
    """Global ids that a rank with these partitions finds for its seed nodes (global; -1: unseen)."""
    bank, part = bank_of(parts), graph()[2]
    search = LiveSearch(bank, part, parts, GraphConfig(dim=D), "cpu")
    local = np.where(seeds < 0, -1, np.searchsorted(bank.nodes_L[: bank.num_inner], seeds))
    return bank.global_of(search.nearest(query, wanted, local))


def brute_force(seed: int, query: np.ndarray, wanted: int) -> list[int]:
    """The nearest nodes in the seed's own part and its first halo; for an unseen image, the nearest of all."""
    z, table, part = graph()
    allowed = np.arange(N)
    if seed >= 0:
        own = np.flatnonzero(part == part[seed])
        allowed = np.union1d(own, table[own].ravel())
        allowed = allowed[(allowed >= 0) & (allowed != seed)]
    return allowed[np.argsort(-(z[allowed] @ query), kind="stable")[:wanted]].tolist()


@pytest.mark.parametrize("parts", [[0], [2], [0, 1], [1, 2], [0, 1, 2]])
def test_a_seed_finds_what_its_own_partition_holds_whoever_else_is_here(parts):
    z, _, part = graph()
    rng = np.random.default_rng(1)
    seeds = rng.permutation(np.flatnonzero(np.isin(part, parts)))[:20]
    query = z[seeds] + rng.normal(0, 0.2, (len(seeds), D)).astype(np.float32)
    found = found_by(parts, seeds, query, 7)
    for row, seed in enumerate(seeds):
        assert found[row].tolist() == brute_force(int(seed), query[row], 7)
    # A search that treats all parts as one would find nodes that this seed may not see.
    everywhere = [brute_force(-1, query[row], 8) for row in range(len(seeds))]
    assert any(set(row.tolist()) - set(whole) for row, whole in zip(found, everywhere, strict=True))


def test_unseen_images_search_everywhere():
    z, _, _ = graph()
    query = z[:9] + np.float32(0.1)
    found = found_by(None, np.full(9, -1), query, 5)
    assert found.tolist() == [brute_force(-1, one, 5) for one in query]
    search = LiveSearch(bank_of(None), graph()[2], None, GraphConfig(dim=D), "cpu")
    assert search.flops_per_query == 2 * N * D


def test_more_than_a_partition_holds_leaves_empty_slots():
    _, table, part = graph()
    seeds = np.flatnonzero(part == 2)[:3]
    own = np.flatnonzero(part == 2)
    there = len(np.union1d(own, table[own].ravel()))
    query = graph()[0][seeds]
    found = found_by([1, 2], seeds, query, there + 2)
    assert (found[:, : there - 1] >= 0).all()
    assert (found[:, there - 1 :] == -1).all()


def test_a_node_is_never_its_own_neighbour_wherever_it_stands():
    """The first and the last row, and a row queried together with an unseen image."""
    bank, (z, _, part) = bank_of(None), graph()
    search = LiveSearch(bank, part, None, GraphConfig(dim=D), "cpu")
    for seeds in ([0], [N - 1], [5, -1], [-1, 0]):
        nodes = np.array(seeds)
        found = search.nearest(z[nodes], N + 2, nodes)
        for row, seed in enumerate(seeds):
            order = np.argsort(-(z @ z[seed]), kind="stable")
            assert found[row].tolist() == [*order[order != seed][: N - 1], -1, -1, -1], seeds


@pytest.mark.parametrize("parts", [None, [0, 1]])
def test_images_without_features_are_found_by_nobody_and_may_ask(parts):
    bank, (z, _, part) = bank_of(parts), graph()
    last = bank.num_inner - 1  # behind every row that can be found
    corrupt = [3, 7, last, *range(bank.num_inner, len(bank.nodes_L))]
    bank.z_Ld[corrupt] = 0.0
    bank.z_Ld[4, 0] = 0.0  # a single zero among other values is nothing special
    search = LiveSearch(bank, part, parts, GraphConfig(dim=D), "cpu")
    seeds = np.array([3, last, 5])
    found = search.nearest(z[bank.nodes_L[seeds]], 60, seeds)
    here = set(found[found >= 0].tolist())
    assert not here & set(corrupt)
    assert 4 in here
    assert 5 in set(found[:2].ravel().tolist())
    assert 5 not in found[2]


@pytest.mark.parametrize("parts", [None, [2], [1, 2]])
def test_a_partition_in_which_nothing_can_be_found_finds_nothing(parts):
    bank, (z, _, part) = bank_of(parts), graph()
    inner = part[bank.nodes_L[: bank.num_inner]]
    own = np.flatnonzero(inner == 2)  # images without a label, and nobody else around them
    around = bank.table_KM[own] if parts == [1, 2] else np.arange(len(bank.nodes_L))
    bank.z_Ld[np.union1d(own, around[around >= 0])] = 0.0
    search = LiveSearch(bank, part, parts, GraphConfig(dim=D), "cpu")
    found = search.nearest(z[bank.nodes_L[own]], 4, own)
    assert (found == -1).all()
    assert (search.flops_per_query > 0) == (parts == [1, 2])


def test_a_batch_of_one_partition_only():
    z, _, part = graph()
    seeds = np.flatnonzero(part == 1)[:4]
    found = found_by([0, 1, 2], seeds, z[seeds], 5)
    assert found.tolist() == [brute_force(int(seed), z[seed], 5) for seed in seeds]


def test_what_inverted_lists_do_not_fill_stays_empty():
    rows = np.array([4, 7, 9])
    assert _Search(None, rows, None).local_of(np.array([[2, -1], [0, 1]])).tolist() == [
        [9, -1],
        [4, 7],
    ]
