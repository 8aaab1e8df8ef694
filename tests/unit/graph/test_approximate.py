"""The approximate table: joins against brute force, builds, refreshes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn2gnn_dist.graph import quality
from cnn2gnn_dist.graph.search import ivf, nn_descent
from cnn2gnn_dist.graph.search.approximate import RecallGoal, TableSearch
from cnn2gnn_dist.graph.search.work_units import RankGroup, WorkFolder, row_ranges

N, M = 3000, 12


def points(seed: int = 0, nodes: int = N, dim: int = 16) -> np.ndarray:
    """Rows of unit length in overlapping clusters; every 50th row is a copy of another."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((30, dim))
    z = centres[rng.integers(0, 30, nodes)] + 0.7 * rng.standard_normal((nodes, dim))
    z[::50] = z[rng.integers(0, nodes, len(z[::50]))]
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def exact(z: np.ndarray, query: np.ndarray, m: int) -> np.ndarray:
    near = query.astype(np.float64) @ z.astype(np.float64).T
    np.fill_diagonal(near, -np.inf)
    return np.argsort(-near, axis=1, kind="stable")[:, :m]


def search(folder: Path, z: np.ndarray, query: np.ndarray | None = None, m: int = M) -> TableSearch:
    return TableSearch(WorkFolder(folder, RankGroup()), z, z if query is None else query, m)


def whole(table: np.ndarray, z: np.ndarray, query: np.ndarray | None = None) -> None:
    """No self, no duplicates, nearest first."""
    query = z if query is None else query
    assert (table != np.arange(len(table))[:, None]).all()
    assert (table >= 0).all()
    assert all(len(set(row)) == len(row) for row in table.tolist())
    near = nn_descent.similarities(table, z, query)
    assert (np.diff(near, axis=1) <= 0).all()


NEAR = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 0.5, 1.0])


@given(st.lists(st.tuples(NEAR, st.integers(-1, 9)), min_size=1, max_size=30))
@settings(deadline=None)
def test_keys_sort_like_pairs(pairs: list[tuple[float, int]]) -> None:
    near = np.array([[p[0] for p in pairs]], np.float32)
    ids = np.array([[p[1] for p in pairs]], np.int32)
    got = nn_descent.ids_of(np.sort(nn_descent.sort_keys(near, ids), axis=1))[0].tolist()
    holes = [-1] * sum(p[1] < 0 for p in pairs)
    assert got == [i for _, i in sorted((-s, i) for s, i in pairs if i >= 0)] + holes


@pytest.mark.parametrize("seed", range(5))
def test_best_of_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = points(seed, 60)
    z[:20] = z[20:40]  # many ties
    ids = rng.integers(-1, 60, (40, 50)).astype(np.int32)
    rows = rng.integers(0, 60, 40)
    got = nn_descent.best_of(ids.copy(), z, z[rows], rows, 8)
    for i, row in enumerate(rows):
        left = sorted(set(ids[i].tolist()) - {-1, int(row)})
        near = nn_descent.similarities(np.array([left]), z, z[[row]])[0]
        want = [left[j] for j in np.lexsort((left, -near))][:8]
        assert got[i].tolist() == want + [-1] * (8 - len(want))


def test_similarities_are_inner_products() -> None:
    z = points(1, 100)
    ids = np.random.default_rng(0).integers(-1, 100, (30, 7))
    got = nn_descent.similarities(ids, z, z[:30])
    want = np.einsum("uwd,ud->uw", z[ids].astype(np.float64), z[:30].astype(np.float64))
    np.testing.assert_allclose(got[ids >= 0], want[ids >= 0], atol=1e-6)
    assert np.isneginf(got[ids < 0]).all()


def test_joined_finds_neighbours_of_neighbours_and_nothing_else() -> None:
    z = points(2, 200)
    table = np.random.default_rng(3).integers(-1, 200, (200, 6)).astype(np.int32)
    back = nn_descent.reverse(table, slice(0, 200), 3)
    rows = np.random.default_rng(4).permutation(200)
    got = nn_descent.joined(table, back, z, z, rows, nn_descent.Width(4, 2, 5))
    for row, found in zip(rows, got, strict=True):
        reach = set(table[row].tolist()) | set(back[row, :2].tolist())
        for near in [*table[row, :4].tolist(), *back[row, :2].tolist()]:
            reach |= set(table[near, :5].tolist()) if near >= 0 else set()
        left = sorted(reach - {-1, int(row)})
        sims = nn_descent.similarities(np.array([left]), z, z[[row]])[0]
        want = [left[j] for j in np.lexsort((left, -sims))][:6]
        assert found.tolist() == want + [-1] * (6 - len(want))


@pytest.mark.parametrize("targets", [slice(0, 90), slice(30, 31), slice(40, 90)])
def test_reverse(targets: slice) -> None:
    table = np.random.default_rng(3).integers(-1, 90, (90, 70)).astype(np.int32)
    got = nn_descent.reverse(table, targets, 5)
    for row, target in enumerate(range(targets.start, targets.stop)):
        whose = [(min(p, 63), s) for s, p in np.argwhere(table == target).tolist()]
        want = [s for _, s in sorted(whose)][:5]
        assert got[row].tolist() == want + [-1] * (5 - len(want))


def test_scan_of_all_lists_is_exact() -> None:
    z = points(5, 500)
    centroids = ivf.train(z, 7)
    home = ivf.nearest_lists(z, centroids, 1)[:, 0]
    order = np.argsort(home, kind="stable").astype(np.int32)
    start = np.searchsorted(home[order], np.arange(8))
    every = np.tile(np.arange(7, dtype=np.int32), (500, 1))
    got = ivf.scan(z, np.arange(500), every, z, order, start, M, M)
    assert quality.recall(got, exact(z, z, M)) > 0.99  # ties among copies, cut off list by list
    whole(got, z)


@pytest.mark.parametrize("another_view", [False, True])
def test_build_reaches_its_goal(tmp_path: Path, another_view: bool) -> None:
    z = points()
    query = points()
    if another_view:
        query = query + 0.05 * np.random.default_rng(1).standard_normal(query.shape)
        query = query.astype(np.float32)
    made = search(tmp_path, z, query if another_view else None)
    found = made.build(RecallGoal(0.98))
    whole(found.table_NM, z, query)
    assert found.rebuilt
    assert found.history[-1] >= 0.98
    true = quality.recall(found.table_NM, exact(z, query, 10))
    assert abs(true - found.history[-1]) < 0.02
    assert sorted(found.order_N.tolist()) == list(range(N))


def test_fewer_candidates_than_ten_can_be_found_in_full(tmp_path: Path) -> None:
    z = points()
    found = search(tmp_path, z, m=4).build(RecallGoal(0.95))
    assert found.history[-1] >= 0.95
    assert quality.recall(found.table_NM, exact(z, z, 4)) > 0.93


def test_recall_counts_what_is_as_near(tmp_path: Path) -> None:
    z = points()
    made = search(tmp_path, z)
    truth = exact(z, z, M).astype(np.int32)
    assert made.recall(truth) == 1.0
    truth[:, 5] = -1
    assert made.recall(truth) == pytest.approx(0.9, abs=0.01)  # copies: the tenth may be a tie


def test_a_refresh_with_nothing_moved_changes_nothing(tmp_path: Path) -> None:
    z = points()
    built = search(tmp_path / "a", z).build(RecallGoal(0.95))
    again = search(tmp_path / "b", z).refresh(built.table_NM, built.order_N, RecallGoal(0.95))
    np.testing.assert_array_equal(again.table_NM, built.table_NM)
    assert not again.rebuilt
    assert again.history == [built.history[-1]]


def test_a_refresh_follows_what_moved(tmp_path: Path) -> None:
    z = points()
    built = search(tmp_path / "a", z).build(RecallGoal(0.97))
    moved = z + 0.015 * np.random.default_rng(7).standard_normal(z.shape).astype(np.float32)
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    found = search(tmp_path / "b", moved).refresh(built.table_NM, built.order_N, RecallGoal(0.97))
    assert not found.rebuilt
    assert found.history[0] < 0.95
    assert found.history[-1] >= 0.97
    assert quality.recall(found.table_NM, exact(moved, moved, 10)) > 0.95
    whole(found.table_NM, moved)


def test_a_hopeless_refresh_builds_anew(tmp_path: Path) -> None:
    z, other = points(), points(9)
    built = search(tmp_path / "a", z).build(RecallGoal(0.95))
    found = search(tmp_path / "b", other).refresh(built.table_NM, built.order_N, RecallGoal(0.95))
    assert found.rebuilt
    assert found.history[0] < 0.1
    assert found.history[-1] >= 0.95
    fresh = search(tmp_path / "c", other).build(RecallGoal(0.95))
    np.testing.assert_array_equal(found.table_NM, fresh.table_NM)


def test_changed_edges() -> None:
    before = np.array([[1, 2], [0, 2], [0, 1]])
    after = np.array([[2, 1], [0, 3], [3, -1]])
    assert quality.changed_edges(before, after) == pytest.approx(2 / 5)


@pytest.mark.parametrize("rows", [1, 5, 6, 7])
def test_spans_cover(rows: int) -> None:
    cut = row_ranges(rows, 3)
    assert [i for span in cut for i in range(span.start, span.stop)] == list(range(rows))
