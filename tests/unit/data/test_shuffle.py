"""The metrics in docs/order.md are correct: the benchmark's functions against plain loops."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections import Counter
from types import ModuleType

import numpy as np
import pytest

from cnn2gnn_dist.data.order import Order
from tests.support import REPOSITORY


@pytest.fixture(scope="module")
def shuffle() -> ModuleType:
    path = REPOSITORY / "benchmarks" / "shuffle.py"
    spec = importlib.util.spec_from_file_location("shuffle_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look up their own module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def epochs() -> list[np.ndarray]:
    """Two epochs of 5 shards of 12, 8 batches of 7: four samples are left over."""
    order = Order(np.full(5, 12), seed=0, global_batch=7, window=2)
    return [np.stack([order.batch(e, i) for i in range(8)]) for e in (0, 1)]


def test_distances(shuffle, epochs):
    place = {int(i): n for n, i in enumerate(epochs[0].ravel())}
    pairs = [(i, i + 1) for s in range(5) for i in range(12 * s, 12 * s + 11)]
    wanted = [abs(place[a] - place[b]) for a, b in pairs if a in place and b in place]
    assert shuffle.distances(epochs[0], 12).tolist() == wanted


def test_variation(shuffle, epochs):
    label = np.arange(60) // 20
    wanted = []
    for batch in epochs[0]:
        seen = Counter(label[batch].tolist())
        wanted.append(sum(max(seen[c] / 7 - 1 / 3, 0) for c in range(3)))
    np.testing.assert_allclose(shuffle.variation(epochs[0], label), wanted)


def test_met_again(shuffle, epochs):
    first, second = (
        {pair for row in e for pair in itertools.combinations(sorted(row.tolist()), 2)}
        for e in epochs
    )
    assert shuffle.met_again(*epochs) == pytest.approx(len(first & second) / len(first))
    assert shuffle.met_again(epochs[0], epochs[0]) == 1


def test_opened(shuffle, monkeypatch):
    monkeypatch.setattr(shuffle, "OPEN_SHARDS", 2)
    assert shuffle.opened(np.array([0, 1, 0, 2, 0, 1])) == 4 / 6  # 1 was dropped for 2


def test_the_formulas_hold(shuffle):
    """For a window of w = W/S, distances are w times those of a full permutation; pairs are as computed."""
    orders = {w: Order(np.full(64, 60), seed=0, global_batch=16, window=w) for w in (8, 16, 64)}
    for window, order in orders.items():
        epochs = [shuffle.epoch_of(order, epoch) for epoch in range(25)]
        near = np.concatenate([shuffle.distances(ids, 60) for ids in epochs]) / 3840
        assert np.median(near) == pytest.approx(0.2929 * window / 64, rel=0.03)
        assert np.quantile(near, 0.05) == pytest.approx(
            0.0253 * window / 64, rel=0.1
        )  # positions are integers
        met = [shuffle.met_again(*pair) for pair in itertools.pairwise(epochs)]
        pairs = np.mean(met) / (15 / 3839)
        assert pairs == pytest.approx(shuffle.expected_pairs(64, window), rel=0.06)
