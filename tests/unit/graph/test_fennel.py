"""The streaming partitioner, and what a refresh moves."""

from __future__ import annotations

import numpy as np
import pytest

from cnn2gnn_dist.graph.partition import fennel
from cnn2gnn_dist.graph.partition import parts as partition

N, M = 4000, 8


def clustered(seed: int = 0, stray: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """A table with 40 groups of 100 nodes under shuffled ids, and the order that keeps groups together."""
    rng = np.random.default_rng(seed)
    group = np.arange(N) // 100
    table = group[:, None] * 100 + rng.integers(0, 100, (N, M))
    table = np.where(rng.random((N, M)) < stray, rng.integers(0, N, (N, M)), table)
    order = rng.permutation(N)  # node order[i] takes position i
    named = np.empty((N, M), np.int64)
    named[order] = order[table]
    return named.astype(np.int32), order.astype(np.int32)


def test_it_improves_on_an_uninformative_order() -> None:
    table, _ = clustered(stray=0.0)
    order = np.random.default_rng(3).permutation(N).astype(np.int32)
    start = np.empty(N, np.int32)
    start[order] = np.arange(N) * 4 // N
    part = fennel.assign_streaming(table, order, 4, passes=30)
    assert partition.edge_cut(table, part) < 0.5 * partition.edge_cut(table, start)


def test_empty_cells_are_not_nodes() -> None:
    table, order = clustered()
    table[:, 5:] = -1
    part = fennel.assign_streaming(table, order, 4)
    assert set(part.tolist()) == {0, 1, 2, 3}


def test_reversed_table() -> None:
    table, _ = clustered()
    back = fennel.reversed_table(table)
    for node in range(0, N, 97):
        whose = np.flatnonzero((table == node).any(1))
        got = back[node][back[node] >= 0]
        assert set(got.tolist()) <= set(whose.tolist())
        assert len(set(got.tolist())) >= min(M, len(whose)) - 2  # a row may have a node twice


def test_only_what_pays_is_moved() -> None:
    table, order = clustered(stray=0.0)
    group_part = np.empty(N, np.int32)
    group_part[order] = np.arange(N) * 4 // N
    wrong = group_part.copy()
    astray = np.random.default_rng(1).choice(N, 40, replace=False)
    wrong[astray] = (wrong[astray] + 1) % 4
    moved = fennel.refine_partition(table, wrong, 4, 4)
    assert set(np.flatnonzero(moved != wrong).tolist()) <= set(astray.tolist())
    assert (moved == group_part).mean() > 0.995
    np.testing.assert_array_equal(fennel.refine_partition(table, wrong, 4, 2 * M + 1), wrong)
    np.testing.assert_array_equal(fennel.refine_partition(table, group_part, 4, 1), group_part)


@pytest.mark.parametrize("least_gain", [1, 3, 6])
def test_moves_never_cut_more_and_keep_balance(least_gain: int) -> None:
    table, _ = clustered(stray=0.2)
    part = np.random.default_rng(5).integers(0, 5, N).astype(np.int32)
    moved = fennel.refine_partition(table, part, 5, least_gain)
    assert partition.edge_cut(table, moved) <= partition.edge_cut(table, part)
    most = max(np.bincount(part).max(), (1 + fennel.SLACK) * N / 5)
    assert np.bincount(moved).max() <= most
