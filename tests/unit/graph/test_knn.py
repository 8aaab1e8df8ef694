"""Neighbor search against dense numpy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn2gnn_dist import settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph import quality
from cnn2gnn_dist.graph.search import exact as exact_search
from cnn2gnn_dist.graph.search import knn
from cnn2gnn_dist.graph.search.work_units import RankGroup, WorkFolder
from cnn2gnn_dist.graph.version import GraphWriter
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.neighbours import candidates
from cnn2gnn_dist.stages.shared.context import Context, RunPaths


def unit(count: int, dim: int, seed: int = 0, clusters: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, dim))
    if clusters:
        rows = 0.3 * rows + rng.normal(size=(clusters, dim))[rng.integers(clusters, size=count)]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def dense(base: np.ndarray, query: np.ndarray, m: int, exclude: np.ndarray | None) -> np.ndarray:
    """The m largest inner products, ties to the smaller id, one query at a time."""
    rows = []
    for number, q in enumerate(query):
        sims = (base @ q).astype(np.float64)
        if exclude is not None and exclude[number] >= 0:
            sims[exclude[number]] = -np.inf
        rows.append(sorted(range(len(base)), key=lambda j: (-sims[j], j))[:m])
    return np.array(rows)


@pytest.mark.parametrize("m", [1, 5, 29])
@pytest.mark.parametrize("exclude", [False, True])
def test_equals_dense(m, exclude):
    base = unit(30, 4)
    out = np.where(np.arange(30) % 3 == 0, -1, np.arange(30)) if exclude else None
    ids, sims = knn.search(base, base, m, exclude_Q=out)
    np.testing.assert_array_equal(ids, dense(base, base, m, out))
    np.testing.assert_allclose(
        sims, np.take_along_axis(base @ base.T, ids.astype(int), 1), rtol=1e-5, atol=1e-6
    )
    assert (np.diff(sims, axis=1) <= 0).all()


def test_duplicates_and_ties_go_to_the_smaller_id():
    base = np.tile(np.eye(3, dtype=np.float32), (4, 1))
    ids, _ = knn.search(base, base, 3, exclude_Q=np.arange(12))
    for row in range(12):
        twins = [j for j in range(12) if j % 3 == row % 3 and j != row]
        assert ids[row].tolist() == twins


def on_device(base: np.ndarray) -> knn.Index:
    """The code path of accelerators (matmul and top-k), on the CPU."""
    index = knn.Index(base)
    index._on_device = torch.from_numpy(index.base_Nd)
    return index


@pytest.mark.parametrize("make", [knn.Index, on_device])
@pytest.mark.parametrize("exclude", [False, True])
def test_more_ties_than_were_fetched_go_to_the_smaller_id(make, exclude):
    # Fifty equal rows come before three better ones: more ties than the extra fetched rows hold.
    base = np.zeros((60, 4), np.float32)
    base[:50, 0], base[50:53, 0] = 0.5, 1.0
    query = np.repeat(np.eye(4, dtype=np.float32)[:1], 30, 0)
    out = np.where(np.arange(30) % 2 == 0, np.arange(30), -1) if exclude else None
    ids, sims = make(base).search(query, 6, exclude=out)
    np.testing.assert_array_equal(ids, dense(base, query, 6, out))
    assert (sims == [1, 1, 1, 0.5, 0.5, 0.5]).all()


@pytest.mark.parametrize("make", [knn.Index, on_device])
def test_coarse_grid_full_of_ties_equals_dense(make, monkeypatch):
    # With small integers every inner product is exact, and so are the ties.
    base = np.random.default_rng(0).integers(-1, 2, (300, 4)).astype(np.float32)
    out = np.arange(300)
    wanted = dense(base, base, 6, out)
    np.testing.assert_array_equal(make(base).search(base, 6, exclude=out)[0], wanted)
    monkeypatch.setattr(knn, "QUERY_BLOCK", 7)
    np.testing.assert_array_equal(make(base).search(base, 6, exclude=out)[0], wanted)


def test_one_point_many_times():
    base = np.repeat(unit(1, 16), 500, 0)
    ids, sims = knn.search(base, base, 4, exclude_Q=np.arange(500))
    for row in (0, 2, 499):
        assert ids[row].tolist() == [j for j in range(5) if j != row][:4]
    np.testing.assert_allclose(sims, 1.0, rtol=1e-6)


def test_holes_of_inverted_lists_are_infinitely_far():
    base = unit(1500, 8)
    index = knn.Index(base, exact=False, probes=1)
    ids, sims = index.search(base[:50], 40, exclude=np.arange(50))
    assert (ids < 0).any()
    assert (sims[ids < 0] == -np.inf).all()
    assert np.isfinite(sims[ids >= 0]).all()
    filled, _ = knn.search(base, base[:50], 40, exclude_Q=np.arange(50), exact=False, probes=1)
    short = (ids < 0).any(1)
    np.testing.assert_array_equal(filled[short], dense(base, base[:50], 40, np.arange(50))[short])
    assert index.flops_per_query < knn.Index(base).flops_per_query


def test_independent_of_how_queries_are_cut(monkeypatch):
    base, query = unit(200, 8), unit(90, 8, seed=1)
    whole, _ = knn.search(base, query, 7)
    monkeypatch.setattr(knn, "QUERY_BLOCK", 13)
    np.testing.assert_array_equal(knn.search(base, query, 7)[0], whole)
    halves = [knn.search(base, part, 7)[0] for part in np.array_split(query, 3)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)


def test_too_many_neighbours():
    base = unit(6, 3)
    knn.search(base, base, 6)
    with pytest.raises(UserError, match="7 neighbors"):
        knn.search(base, base, 7)
    with pytest.raises(UserError, match="the query itself"):
        knn.search(base, base, 6, exclude_Q=np.arange(6))


def test_inverted_lists_find_most_and_fill_every_row():
    base = unit(3000, 16, clusters=40)
    exact, _ = knn.search(base, base[:200], 10, exclude_Q=np.arange(200))
    near, _ = knn.search(base, base[:200], 10, exclude_Q=np.arange(200), exact=False, probes=8)
    again, _ = knn.search(base, base[:200], 10, exclude_Q=np.arange(200), exact=False, probes=8)
    np.testing.assert_array_equal(near, again)
    assert (near >= 0).all()
    assert quality.recall(near, exact) > 0.8
    assert (near != np.arange(200)[:, None]).all()


def test_quality_by_loops():
    table = np.array([[1, 2], [0, -1], [0, 1], [2, 0]])
    labels = np.array([0, 0, 1, -1])
    edges = [(i, j) for i, row in enumerate(table) for j in row if j >= 0]
    known = [(i, j) for i, j in edges if labels[i] >= 0 and labels[j] >= 0]
    same = sum(labels[i] == labels[j] for i, j in known)
    assert quality.edge_homophily(table, labels) == pytest.approx(same / len(known))
    stats = quality.degree_stats(table)
    degree = [sum(j == node for _, j in edges) for node in range(4)]
    assert (stats["min"], stats["max"], stats["mean"]) == (
        min(degree),
        max(degree),
        np.mean(degree),
    )
    assert sum(stats["histogram"]["nodes"]) == 4
    assert quality.recall(np.array([[1, 2, 3]]), np.array([[3, 9, 1]])) == pytest.approx(2 / 3)
    assert quality.recall(np.array([[1, -1]]), np.array([[2, -1]])) == 0.0  # -1 never matches


def test_a_search_inside_autocast_stays_in_float32():
    base = unit(4000, 32)
    base = (base + 3 * base[:1]).astype(np.float32)  # close together: bfloat16 changes their order
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    index = on_device(base)
    plain, _ = index.search(base[:50], 10)
    with torch.autocast("cpu", torch.bfloat16):
        inside, sims = index.search(base[:50], 10)
    np.testing.assert_array_equal(inside, plain)
    assert sims.dtype == np.float32


def test_device_blocks_bounded_by_memory_change_nothing(monkeypatch):
    base = unit(300, 8)
    whole = on_device(base).search(base, 7)
    monkeypatch.setattr(knn, "DEVICE_CELLS", 1000)  # three queries at once
    cut = on_device(base).search(base, 7)
    np.testing.assert_array_equal(cut[0], whole[0])
    np.testing.assert_allclose(cut[1], whole[1], rtol=1e-6)


def test_inverted_lists_independent_of_how_queries_are_cut():
    base = unit(2000, 16, clusters=20)
    index = knn.Index(base, exact=False, probes=4)
    whole, _ = index.search(base[:60], 5)
    ones = [index.search(base[row : row + 1], 5)[0] for row in range(60)]
    np.testing.assert_array_equal(np.concatenate(ones), whole)


def test_weighted_homophily_by_a_loop():
    table = np.array([[1, 2], [0, -1], [0, 3], [2, 0]])
    labels = np.array([0, 0, 1, -1])
    weights = np.array([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5], [0.9, 0.1]])
    known = [
        (weights[i, c], labels[i] == labels[j])
        for i, row in enumerate(table)
        for c, j in enumerate(row)
        if j >= 0 and labels[i] >= 0 and labels[j] >= 0
    ]
    wanted = sum(w for w, same in known if same) / sum(w for w, _ in known)
    assert quality.edge_homophily(table, labels, weights) == pytest.approx(wanted)
    assert quality.edge_homophily(table, labels, 0 * weights) == 0.0


def test_a_device_search_needs_no_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code path of a GPU, on a machine without faiss; the device here is the CPU."""
    rng = np.random.default_rng(3)
    z = rng.standard_normal((700, 8)).astype(np.float32)
    z[::9] = z[1]  # ties that extend beyond what is fetched
    near = np.einsum("nd,md->nm", z, z)
    np.fill_diagonal(near, -np.inf)
    want = np.argsort(-near, axis=1, kind="stable")[:, :6]
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it raises ImportError
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(exact_search, "ROWS", 200)
    with pytest.raises(ImportError):
        exact_search.exact_table(WorkFolder(tmp_path / "cpu", RankGroup(threads=2)), z, z, 6, "cpu")
    found = exact_search.exact_table(
        WorkFolder(tmp_path / "gpu", RankGroup(threads=2)), z, z, 6, "cuda"
    )
    np.testing.assert_array_equal(found.table_NM, want)


@pytest.mark.parametrize(("device", "threads"), [("cpu", 3), ("cuda", 1)])
def test_on_a_gpu_one_thread_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, threads: int
) -> None:
    """Each thread would hold its own similarities, up to ``DEVICE_CELLS``."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    context = Context(
        settings.load("demo", []), Ranks(), RunPaths(tmp_path), tmp_path, "key", device, False
    )
    work_folder = candidates.open_work_folder(context, GraphWriter(tmp_path))
    assert work_folder.group.threads == threads
