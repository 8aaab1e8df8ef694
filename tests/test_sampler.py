"""Samplers and blocks against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from test_partition import random_table

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.block import queried_block, sampled_block
from cnn2gnn_dist.graph.sampler import make_sampler

KEY = {"epoch": 1, "step": 2, "hop": 1, "rank": 0}


@pytest.fixture(params=["table", "dgl"])
def kind(request):
    return request.param


def table(holes: bool = False) -> np.ndarray:
    return random_table(50, 8, 3, holes)


def test_full_fanout_gives_every_candidate(kind):
    for holes in (False, True):
        made = make_sampler(kind, table(holes), seed=0)
        rows = np.array([4, 0, 49, 17])
        for fanout in (8, 20):
            found = made.neighbours(rows, fanout, **KEY)
            assert found.shape == (4, 8)
            for row, got in zip(rows, found, strict=True):
                assert sorted(got[got >= 0]) == sorted(j for j in table(holes)[row] if j >= 0)


def test_samples_are_candidates_without_repetition_and_holes_last(kind):
    made = make_sampler(kind, table(holes=True), seed=0)
    rows = np.arange(50)
    found = made.neighbours(rows, 3, **KEY)
    for row, got in zip(rows, found, strict=True):
        there = [j for j in table(holes=True)[row] if j >= 0]
        kept = got[got >= 0]
        assert len(kept) == min(3, len(there))
        assert len(set(kept)) == len(kept)
        assert set(kept) <= set(there)


def test_the_key_decides(kind):
    made, twin = (make_sampler(kind, table(), seed=7) for _ in range(2))
    rows = np.arange(50)
    first = made.neighbours(rows, 3, **KEY)
    made.neighbours(rows, 3, **{**KEY, "step": 9})
    np.testing.assert_array_equal(np.sort(twin.neighbours(rows, 3, **KEY)), np.sort(first))
    for name in KEY:
        other = made.neighbours(rows, 3, **{**KEY, name: 5})
        assert (np.sort(other) != np.sort(first)).any()
    seeded = make_sampler(kind, table(), seed=8).neighbours(rows, 3, **KEY)
    assert (np.sort(seeded) != np.sort(first)).any()


def test_every_candidate_is_drawn_about_as_often(kind):
    made = make_sampler(kind, table(), seed=0)
    counts = np.zeros(50)
    for step in range(800):
        found = made.neighbours(np.array([5]), 2, **{**KEY, "step": step})
        counts[found[0]] += 1
    drawn = counts[table()[5]]
    assert drawn.sum() == 1600
    # 800 draws of 2 from 8: mean 200, standard deviation 12; five of them.
    assert (abs(drawn - 200) < 62).all()


def test_unknown_sampler():
    with pytest.raises(UserError, match="distdgl"):
        make_sampler("distdgl", table(), seed=0)


def naive(first, seeds, second_of):
    """Sets and dictionaries in place of index arithmetic."""
    nodes, unique = set(), set()
    for row, seed in zip(first, seeds, strict=True):
        unique |= {int(j) for j in row if j >= 0 and j != seed}
    for node in unique:
        nodes |= {node} | {int(j) for j in second_of(node) if j >= 0}
    nodes |= {int(s) for s in seeds if s >= 0}
    return nodes, unique


@pytest.mark.parametrize("unseen", [False, True])
def test_block_of_given_neighbours(unseen):
    graph = table(holes=True)
    made = make_sampler("table", graph, seed=0)
    rng = np.random.default_rng(0)
    seeds = np.full(6, -1) if unseen else rng.integers(0, 50, 6)
    first = rng.integers(-1, 50, (6, 5))
    first[0, 0] = seeds[0]
    block = queried_block(made, first, seeds, 8, epoch=0, step=0, rank=0)
    nodes, unique = naive(first, seeds, lambda node: graph[node])
    assert block.nodes_V.tolist() == sorted(nodes)
    assert block.nodes_V[block.unique_U].tolist() == sorted(unique)
    for row in range(6):
        for slot in range(5):
            wanted = first[row, slot] if first[row, slot] != seeds[row] else -1
            place, which = block.first_BF[row, slot], block.unique_of_BF[row, slot]
            if wanted < 0:
                assert place == which == -1
            else:
                assert block.nodes_V[place] == wanted
                assert block.unique_U[which] == place
        if unseen:
            assert block.seed_V[row] == -1
        else:
            assert block.nodes_V[block.seed_V[row]] == seeds[row]
    for number, node in enumerate(sorted(unique)):
        got = block.second_UG[number]
        assert sorted(block.nodes_V[got[got >= 0]]) == sorted(j for j in graph[node] if j >= 0)


def test_sampled_block_takes_candidates_of_its_seeds(kind):
    graph = table()
    made = make_sampler(kind, graph, seed=0)
    seeds = np.array([3, 9, 3, 41])
    block = sampled_block(made, seeds, (4, 3), epoch=0, step=5, rank=1)
    assert block.first_BF.shape == (4, 4)
    assert block.second_UG.shape == (len(block.unique_U), 3)
    for row, seed in enumerate(seeds):
        assert set(block.nodes_V[block.first_BF[row]]) <= set(graph[seed])
    np.testing.assert_array_equal(block.first_BF[0], block.first_BF[2])
    again = sampled_block(made, seeds, (4, 3), epoch=0, step=5, rank=1)
    np.testing.assert_array_equal(again.nodes_V, block.nodes_V)
