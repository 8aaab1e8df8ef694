"""Blocks compared with sets and dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn2gnn_dist.graph.block import BlockIds, block_ids
from cnn2gnn_dist.graph.sampler import make_sampler
from tests.support.blocks import first_of, sampled_block
from tests.support.graphs import random_table

KEY = {"epoch": 0, "step": 0, "rank": 0}


def check(block: BlockIds, graph: np.ndarray, first: np.ndarray, seeds: np.ndarray) -> None:
    """Assert that a block with full second fan-out has, for every node, what the table has."""
    nodes = block.nodes_V
    wanted_first = [
        [-1 if j < 0 or j == seed else int(j) for j in row]
        for row, seed in zip(first, seeds, strict=True)
    ]
    unique = sorted({j for row in wanted_first for j in row if j >= 0})
    second = {j: sorted(int(l) for l in graph[j] if l >= 0) for j in unique}  # noqa: E741
    everyone = {*unique, *(int(s) for s in seeds if s >= 0)}
    everyone |= {l for row in second.values() for l in row}  # noqa: E741
    assert nodes.tolist() == sorted(everyone)

    ids = np.append(nodes, -1)  # index -1 reads -1
    assert ids[first_of(block)].tolist() == wanted_first
    assert ids[block.first_U].tolist() == unique
    assert ids[block.seed_B].tolist() == [max(int(s), -1) for s in seeds]
    assert len(block.second_UG) == len(unique)
    for node, row in zip(unique, ids[block.second_UG], strict=True):
        assert sorted(row[row >= 0].tolist()) == second[node]
    for array in (block.nodes_V, block.first_U, block.row_of_BF, block.second_UG):
        assert array.dtype == np.int64


@settings(deadline=None, max_examples=80)
@given(
    nodes=st.integers(4, 30),
    width=st.integers(1, 6),
    seeds=st.integers(1, 8),
    slots=st.integers(1, 6),
    number=st.integers(0, 999),
    holes=st.booleans(),
)
def test_any_block_equals_the_naive_one(nodes, width, seeds, slots, number, holes):
    graph = random_table(nodes, min(width, nodes - 1), number, holes)
    rng = np.random.default_rng(number)
    seeds_B = rng.integers(-1, nodes, seeds)  # including unseen (-1) and repeated ones
    first = rng.integers(-1, nodes, (seeds, slots)).astype(np.int32)
    made = make_sampler("table", graph, seed=0)
    check(block_ids(made, first, seeds_B, width, **KEY), graph, first, seeds_B)


@pytest.mark.parametrize("kind", ["table", "dgl"])
@pytest.mark.parametrize("holes", [False, True])
def test_candidates_of_seeds_at_full_fanout(kind, holes):
    graph = random_table(50, 8, 3, holes)
    seeds_B = np.array([31, 4, 4, 17, 0])
    block = sampled_block(make_sampler(kind, graph, 0), seeds_B, (8, 8), **KEY)
    first = np.append(block.nodes_V, -1)[first_of(block)]
    for row, seed in zip(first, seeds_B, strict=True):
        assert sorted(row.tolist()) == sorted(graph[seed].tolist())
    check(block, graph, first, seeds_B)


@pytest.mark.parametrize("kind", ["table", "dgl"])
def test_sampled_block_takes_candidates_of_its_seeds(kind):
    graph = random_table(50, 8, 3)
    made = make_sampler(kind, graph, seed=0)
    seeds = np.array([3, 9, 3, 41])
    block = sampled_block(made, seeds, (4, 3), epoch=0, step=5, rank=1)
    assert first_of(block).shape == (4, 4)
    assert block.second_UG.shape == (len(block.first_U), 3)
    for row, seed in enumerate(seeds):
        assert set(block.nodes_V[first_of(block)[row]]) <= set(graph[seed])
    for row, node in zip(block.second_UG, block.nodes_V[block.first_U], strict=True):
        assert set(block.nodes_V[row]) <= set(graph[node])
    np.testing.assert_array_equal(first_of(block)[0], first_of(block)[2])
    again = sampled_block(made, seeds, (4, 3), epoch=0, step=5, rank=1)
    np.testing.assert_array_equal(again.nodes_V, block.nodes_V)
    other = sampled_block(made, seeds, (4, 3), epoch=0, step=6, rank=1)
    assert other.nodes_V.tolist() != block.nodes_V.tolist()


@pytest.mark.parametrize("kind", ["table", "dgl"])
def test_a_seed_leaves_its_own_candidates_but_not_those_of_others(kind):
    graph = np.array([[1, 2], [0, 2], [0, 1]], np.int32)
    first = np.array([[0, 1], [0, 2], [1, -1]])
    block = block_ids(make_sampler(kind, graph, 0), first, np.array([0, 1, -1]), 2, **KEY)
    assert first_of(block).tolist() == [[-1, 1], [0, 2], [1, -1]]
    assert block.first_U.tolist() == [0, 1, 2]
    assert block.seed_B.tolist() == [0, 1, -1]
    assert np.sort(block.second_UG).tolist() == [[1, 2], [0, 2], [0, 1]]  # node 1 keeps seed 0


@pytest.mark.parametrize("kind", ["table", "dgl"])
def test_a_seed_whose_only_candidate_is_itself(kind):
    graph = random_table(6, 2, 0)
    block = block_ids(make_sampler(kind, graph, 0), np.array([[4]]), np.array([4]), 2, **KEY)
    assert block.nodes_V.tolist() == [4]
    assert first_of(block).tolist() == block.row_of_BF.tolist() == [[-1]]
    assert block.first_U.tolist() == []
    assert block.second_UG.shape == (0, 2)


@pytest.mark.parametrize("kind", ["table", "dgl"])
def test_second_halo_nodes_have_no_second_hop(kind):
    graph = np.array([[1, 2], [2, 4], [0, 3]], np.int32)  # 3 and 4 have no rows
    first = np.array([[1, 3], [4, -1]])
    block = block_ids(make_sampler(kind, graph, 0), first, np.array([0, -1]), 2, **KEY)
    ids = np.append(block.nodes_V, -1)
    assert ids[block.first_U].tolist() == [1, 3, 4]
    assert ids[block.second_UG].tolist() == [[2, 4], [-1, -1], [-1, -1]]
