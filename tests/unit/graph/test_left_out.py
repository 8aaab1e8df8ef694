"""Nodes that must not be neighbors: corrupt images, and a seed's own image under another id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnn2gnn_dist import settings
from cnn2gnn_dist.graph import duplicates, quality
from cnn2gnn_dist.graph.bank import Bank
from cnn2gnn_dist.graph.partition import parts as partition
from cnn2gnn_dist.graph.search import approximate, nn_descent
from cnn2gnn_dist.graph.version import GraphVersion, GraphWriter, open_version
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages import graph
from cnn2gnn_dist.stages.neighbours import candidates
from cnn2gnn_dist.stages.neighbours.live_search import LiveSearch
from cnn2gnn_dist.stages.neighbours.neighbourhood import Neighbourhood
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from tests.unit.graph.test_approximate import exact, points

N, M = 1500, 12
CORRUPT = np.array([0, 3, 4, 700, N - 1])
REST = np.setdiff1d(np.arange(N), CORRUPT)


def context(folder: Path, *overrides: str) -> Context:
    config = settings.load("demo", [f"graph.candidates={M}", "graph.neighbours=3", *overrides])
    return Context(config, Ranks(), RunPaths(folder), folder, "key", "cpu", False)


def find(
    folder: Path, z: np.ndarray, query: np.ndarray | None, before: Any = None, *how: str
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    shapes = {
        "z": (z.shape, np.float32),
        "candidates": ((len(z), M), np.int32),
        "order": ((len(z),), np.int32),
    }
    writer = GraphWriter.create(folder, 1, shapes)
    writer.rows("z", 0, z)
    note = candidates.find(context(folder, *how), writer, query, before)
    return np.array(writer.array("candidates")), np.array(writer.array("order")), note


def without_corrupt(z: np.ndarray) -> np.ndarray:
    z = z.copy()
    z[CORRUPT] = 0
    return z


@pytest.mark.parametrize("another_view", [False, True])
@pytest.mark.parametrize("how", ["exact", "lists", "refreshed"])
def test_corrupt_images_are_in_no_row_and_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, another_view: bool
) -> None:
    for name in ("SCAN_ROWS", "JOIN_ROWS", "PROBE_ROWS"):
        monkeypatch.setattr(approximate, name, 400)
    z, query = points(0, N), None
    if another_view:
        query = z + 0.05 * np.random.default_rng(1).standard_normal(z.shape).astype(np.float32)
    options = [f"graph.search.exact={str(how == 'exact').lower()}", "graph.search.recall=0.97"]
    before = None
    if how == "refreshed":  # no image was known to be corrupt in the previous table
        table, order, _ = find(tmp_path / "before", z, query, None, *options)
        before = GraphVersion(tmp_path, {})
        before.__dict__.update(candidates=table, order=order)
    z = without_corrupt(z)
    query = None if query is None else without_corrupt(query)
    table, order, note = find(tmp_path / "now", z, query, before, *options)
    assert (table[CORRUPT] == -1).all()
    assert not np.isin(table[REST], CORRUPT).any()
    assert (table[REST] >= 0).all()
    assert (table != np.arange(N)[:, None]).all()
    assert sorted(order.tolist()) == list(range(N))
    asked = z if query is None else query
    want = REST[exact(z[REST], asked[REST], M)]
    if how == "exact":  # copies may be in another order: they are equally near
        near = [nn_descent.similarities(t, z, asked[REST]) for t in (table[REST], want)]
        np.testing.assert_allclose(*near, atol=1e-5)
    else:
        assert note["rebuilt"] == (how == "lists")
        assert quality.recall(table[REST], want[:, :10]) > 0.95


def held(z: np.ndarray, parts: int = 1) -> tuple[Bank, np.ndarray]:
    """A bank of all of z, and the part of each node."""
    table = exact(z, z, M).astype(np.int32)
    part_N = partition.assign_ranges(table, parts)
    x = torch.zeros(len(z), 4, dtype=torch.float16)
    everyone = np.arange(len(z), dtype=np.int32)
    labels = torch.zeros(len(z), dtype=torch.int32)
    return Bank(x, torch.from_numpy(z), labels, everyone, len(z), table), part_N


@pytest.mark.parametrize("parts", [None, [0, 1]])
def test_a_live_search_finds_no_corrupt_image(tmp_path: Path, parts: list[int] | None) -> None:
    # All other nodes are placed so that their inner products with the seeds are negative.
    z = -np.abs(points(2, 60, 4))
    z[[1, 5, 40]] = 0
    kept, part_N = held(z, 2)
    search = LiveSearch(kept, part_N, parts, context(tmp_path).config.graph, "cpu")
    seeds = np.array([0, 2, 41, 1]) if parts else np.array([0, 2, 41, -1])
    found = search.nearest(-z[[0, 2, 41, 7]], 20, seeds)
    assert not np.isin(found, [1, 5, 40]).any()
    assert (found[:3] != seeds[:3, None]).all()
    if parts is None:
        near = -z[[0, 2, 41, 7]] @ z.T
        near[:, [1, 5, 40]] = -np.inf
        near[np.arange(3), seeds[:3]] = -np.inf
        np.testing.assert_array_equal(found, np.argsort(-near, axis=1, kind="stable")[:, :20])


KEYS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), max_size=25)


@given(KEYS)
def test_groups_are_connected_components(rows: list[tuple[int, int, bool]]) -> None:
    one, two = (np.array([r[i] for r in rows], np.int64) for i in (0, 1))
    apart = np.array([r[2] for r in rows], bool)
    want = list(range(len(rows)))
    for _ in rows:  # as many rounds as a group's number may need to propagate
        for i, (a, b, alone) in enumerate(rows):
            for j, (c, d, other) in enumerate(rows):
                if not (alone or other) and (a == c or b == d):
                    want[i] = want[j] = min(want[i], want[j])
    found = duplicates.groups(one, two, apart=apart)
    assert found.tolist() == want
    sizes = [want.count(w) for w in want]
    most = max(sizes, default=1)
    assert duplicates.summary(found) == {"nodes": sum(s > 1 for s in sizes), "most": most}
    assert (
        duplicates.groups(one, None, apart=apart).tolist()
        == duplicates.groups(one, one, apart=apart).tolist()
    )


def test_equal_rows_have_equal_keys_and_others_do_not() -> None:
    rng = np.random.default_rng(4)
    x = rng.integers(-2, 3, (20_000, 3)).astype(np.float16)  # 125 distinct rows, over two chunks
    keys, kinds = duplicates.row_keys(x), {}
    for key, row in zip(keys.tolist(), map(tuple, x.tolist()), strict=True):
        assert kinds.setdefault(row, key) == key
    assert len(set(kinds.values())) == len(kinds) == 125


def version_with_twins(root: Path) -> tuple[GraphVersion, np.ndarray]:
    """60 nodes in two parts; 10, 11 and 40 are one image, 20 and 21 another, and copies are each other's nearest."""
    z = points(3, 60, 8)
    z[[11, 40]], z[21] = z[10], z[20]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 6)).astype(np.float16)
    x[[11, 40]], x[21] = x[10], x[20]
    twin = duplicates.groups(duplicates.row_keys(x))
    table = exact(z, z, M).astype(np.int32)
    arrays = {
        "x": x,
        "z": z,
        "labels": np.arange(60, dtype=np.int32),
        "candidates": table,
        "part": partition.assign_ranges(table, 2),
        "order": np.arange(60, dtype=np.int32),
        "twin": twin,
    }
    writer = GraphWriter.create(root, 1, {n: (a.shape, a.dtype.type) for n, a in arrays.items()})
    for name, array in arrays.items():
        writer.rows(name, 0, array)
    for number in range(2):
        partition.build_part(table, arrays["part"], number).save(writer.path / f"part-0{number}")
    made = writer.finalise({"key": "k", "search": {"twins": duplicates.summary(twin)}})
    return open_version(made), z


@pytest.mark.parametrize("second_hop", ["sampled", "cached"])
@pytest.mark.parametrize(
    ("query", "sampler"), [("live", "table"), ("table", "table"), ("table", "dgl")]
)
def test_a_seed_meets_no_twin_and_an_unseen_image_does(
    tmp_path: Path, query: str, sampler: str, second_hop: str
) -> None:
    version, z = version_with_twins(tmp_path)
    assert version.meta["search"]["twins"] == {"nodes": 5, "most": 3}
    how = [
        f"graph.sampling.query={query}",
        f"graph.sampling.sampler={sampler}",
        f"graph.sampling.second_hop={second_hop}",
    ]
    ours = context(tmp_path, *how, "graph.sampling.fanouts=[8,8]")
    seeds = np.array([10, 20, 5, 11])
    for own_parts, ids in ((None, seeds), ([0], seeds), ([1], np.array([40, 41]))):
        around = Neighbourhood(ours, version, own_parts)
        asked = around.around(ids, 0, 0)
        block = asked.block(torch.from_numpy(z[ids]))
        same = {10: {10, 11, 40}, 11: {10, 11, 40}, 40: {10, 11, 40}, 20: {20, 21}}
        for seed, row in zip(ids.tolist(), asked.first_BF.tolist(), strict=True):
            assert not set(row) & same.get(seed, {seed})
        # Labels are ids here, so that they show what the model sees.
        labels = block.first_labels_BF().numpy()
        there = asked.first_BF >= 0
        np.testing.assert_array_equal(labels[there], asked.first_BF[there])
        if query == "live" and own_parts is None:  # no seed has fewer neighbors because of it
            near = z[ids] @ z.T
            for row, seed in enumerate(ids.tolist()):
                near[row, list(same.get(seed, {seed}))] = -np.inf
            want = np.argsort(-near, axis=1, kind="stable")[:, :8]
            np.testing.assert_array_equal(asked.first_BF, want)
    around = Neighbourhood(ours, version, None)
    unseen = around.around_unseen(1)
    unseen.block(torch.from_numpy(z[[10]]))
    assert set(unseen.first_BF[0, :3].tolist()) == {10, 11, 40}


def test_a_version_that_knows_of_no_twins_is_read(tmp_path: Path) -> None:
    version, z = version_with_twins(tmp_path)
    version.meta.pop("search")
    (version.path / "twin.npy").unlink()
    around = Neighbourhood(context(tmp_path, "graph.sampling.query=live"), version, None)
    asked = around.around(np.array([10]), 0, 0)
    asked.block(torch.from_numpy(z[[10]]))
    assert {11, 40} <= set(asked.first_BF[0].tolist())


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({}, ""),  # before twins were introduced
        ({"twins": {"nodes": 0, "most": 1}}, ""),
        ({"twins": {"nodes": 7, "most": 4}}, ", 7 images equal others (at most 4 one another)"),
    ],
)
def test_a_version_says_how_many_images_have_twins(search: dict[str, Any], said: str) -> None:
    counts = {"nodes": 9, "candidates": 3, "homophily": 1.0, "cut": 0.0, "inner": [9], "halo": [0]}
    meta = {**counts, "degree": {"min": 1, "max": 5}, "search": {"exact": True, **search}}
    assert graph.describe(meta).endswith(f"in-degree 1..5{said}")
