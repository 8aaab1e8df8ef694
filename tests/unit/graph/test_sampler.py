"""Samplers and blocks compared with plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.sampler import make_sampler
from tests.support.graphs import random_table

KEY = {"epoch": 1, "step": 2, "hop": 1, "rank": 0}


KINDS = ("table", "dgl")


@pytest.fixture(params=KINDS)
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
        changes = (np.sort(other) != np.sort(first)).any()
        assert changes == ((kind, name) != ("table", "rank"))  # keyed by node, not by rank
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
    # 800 draws of 2 from 8: mean 200, standard deviation 12; the tolerance is five of them.
    assert (abs(drawn - 200) < 62).all()


def test_unknown_sampler():
    with pytest.raises(UserError, match="distdgl"):
        make_sampler("distdgl", table(), seed=0)


def test_both_samplers_give_the_same_sets_at_full_fanout():
    for holes in (False, True):
        rows = np.random.default_rng(1).permutation(50)
        found = [make_sampler(k, table(holes), 0).neighbours(rows, 8, **KEY) for k in KINDS]
        np.testing.assert_array_equal(*(np.sort(each, axis=1) for each in found))


@pytest.mark.parametrize("fanout", [2, 8])
def test_rows_may_be_none_or_repeated(kind, fanout):
    made = make_sampler(kind, table(), seed=0)
    assert made.neighbours(np.array([], np.int64), fanout, **KEY).shape == (0, fanout)
    rows = np.array([7, 3, 7, 7, 20])
    found = made.neighbours(rows, fanout, **KEY)
    for row, got in zip(rows, found, strict=True):
        assert len(set(got)) == fanout
        assert set(got) <= set(table()[row])


def test_holes_give_way_to_candidates(kind):
    graph = np.full((12, 6), -1, np.int32)
    for node in range(12):  # node % 6 candidates, at the end of the row
        count = node % 6
        graph[node, 6 - count :] = (node + 1 + np.arange(count)) % 12
    made = make_sampler(kind, graph, seed=0)
    for step in range(20):
        found = made.neighbours(np.arange(12), 3, **{**KEY, "step": step})
        assert (found >= 0).sum(1).tolist() == [min(3, node % 6) for node in range(12)]


def test_samples_do_not_depend_on_what_was_asked_before(kind):
    made = make_sampler(kind, table(), seed=0)
    rows = np.arange(0, 50, 3)
    wanted = [made.neighbours(rows, 3, **{**KEY, "step": step}) for step in range(6)]
    for step in (4, 0, 5, 5, 2):
        again = made.neighbours(rows, 3, **{**KEY, "step": step})
        np.testing.assert_array_equal(np.sort(again, 1), np.sort(wanted[step], 1))


def test_tables_with_rows_of_inner_nodes_only(kind):
    # As in a part's table: candidates may be second-halo nodes, which have no row themselves.
    graph = np.array([[1, 7], [9, 0], [3, 8]], np.int32)
    made = make_sampler(kind, graph, seed=0)
    assert np.sort(made.neighbours(np.array([1, 2]), 2, **KEY)).tolist() == [[0, 9], [3, 8]]


def test_samples_stand_in_the_order_of_the_table(kind):
    graph = table(holes=True)
    found = make_sampler(kind, graph, seed=0).neighbours(np.arange(50), 4, **KEY)
    for row, got in zip(graph.tolist(), found, strict=True):
        places = [row.index(j) for j in got if j >= 0]
        assert places == sorted(places)


@pytest.mark.parametrize("row", [-1, 50])
def test_rows_outside_the_table_are_refused(kind, row):
    made = make_sampler(kind, table(), seed=0)
    assert made.num_rows == 50
    with pytest.raises(IndexError, match="table of 50 rows"):
        made.neighbours(np.array([3, row]), 2, **KEY)


def test_sampling_leaves_the_number_of_threads_alone(kind):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        make_sampler(kind, table(), seed=0).neighbours(np.arange(5), 2, **KEY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_samples_of_dgl_do_not_depend_on_the_number_of_threads():
    from cnn2gnn_dist.compat import import_dgl

    threads = import_dgl().utils
    before = threads.get_num_threads()
    made = make_sampler("dgl", random_table(400, 20, 0), seed=0)
    try:
        found = []
        for count in (1, 3):
            threads.set_num_threads(count)
            found.append(made.neighbours(np.arange(400), 5, **KEY))
            assert threads.get_num_threads() == count
    finally:
        threads.set_num_threads(before)
    np.testing.assert_array_equal(*found)


def test_a_nodes_sample_does_not_depend_on_its_place():
    """Rows in another order, as in a partition, get the same samples as in the full graph: global ids are the key."""
    whole = table()
    nodes = np.random.default_rng(3).permutation(len(whole))[:20]
    part = make_sampler("table", whole[nodes], 7, nodes)
    everyone = make_sampler("table", whole, 7)
    rows = np.arange(20)
    np.testing.assert_array_equal(
        part.neighbours(rows, 3, **{**KEY, "rank": 1}), everyone.neighbours(nodes, 3, **KEY)
    )
