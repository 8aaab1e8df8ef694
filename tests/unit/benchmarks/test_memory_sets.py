"""The benchmark of sets answered together: its rivals by hand, their constants, its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnn2gnn_dist.inference.sets.relations import Relations
from cnn2gnn_dist.inference.sets.together import Together
from tests.support.benchmarks import benchmark

sets = benchmark("remembering.sets")
episodes = benchmark("remembering.episodes")


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def example(m: int = 7, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(m)
    return rng.standard_normal((m, classes)), unit(rng.standard_normal((m, 4)))


@pytest.mark.parametrize("m", [2, 3, 7])
def test_laplacian_shot_adds_the_nearest_images_of_the_set(m: int) -> None:
    """Image by image, as the paper's Algorithm 1: y_i ~ exp(log p_i + λ Σ over its nearest y_j)."""
    logits, z = example(m)
    strength, t = 0.7, 1.5
    own = np.log(np.exp(logits / t) / np.exp(logits / t).sum(1, keepdims=True))
    y = np.exp(own)
    for _ in range(20):
        new = np.empty_like(y)
        for i in range(m):
            others = sorted((j for j in range(m) if j != i), key=lambda j, i=i: -z[i] @ z[j])[:3]
            raised = np.exp(own[i] + strength * sum(y[j] for j in others))
            new[i] = raised / raised.sum()
        y = new
    np.testing.assert_allclose(episodes.agreed(own, z, strength), y, atol=1e-12)
    assert (sets.laplacian(logits, z, t, strength) == y.argmax(1)).all()


def test_soft_k_means_moves_the_means_by_its_scale() -> None:
    logits, z = example()
    means, t, scale = unit(np.eye(3, 4)), 1.0, 10.0
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    q = np.exp(log_p)
    for _ in range(10):
        centres = unit(
            np.stack([means[c] + sum(q[i, c] * z[i] for i in range(7)) for c in range(3)])
        )
        raised = np.exp(log_p + scale * z @ centres.T)
        q = raised / raised.sum(1, keepdims=True)
    assert (sets.soft_k_means(logits, z, t, means, scale) == q.argmax(1)).all()
    assert (q.argmax(1) != sets.soft_k_means(logits, z, t, means, 0.01)).any()


def related(count: int = 40, classes: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that hardly tell the classes, and z that does."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), count)
    logits = rng.standard_normal((len(labels), classes)) + 0.8 * np.eye(classes)[labels]
    z = unit(3 * np.eye(classes)[labels] + rng.standard_normal((len(labels), classes)))
    return logits, z, labels


@pytest.fixture(scope="module")
def rule() -> Together:
    return Together.fit(*related())


def test_constants_are_the_best_of_all_on_the_calibration_sets(rule: Together) -> None:
    logits, z, labels = related()
    means = np.eye(8)
    found = sets.fit(rule, means, logits, z, labels, sets=6)
    kinds = [(m, k) for m, k in sets.SETS if k <= 8]

    def right(fitted: Any, way: str) -> float:
        answer = sets.answers(rule, means, fitted)[way]
        shares = []
        for size, kind in kinds:
            for number in range(6):
                at = sets.drawn(labels, size, kind, np.random.default_rng([size, kind, number]))
                shares.append((answer(logits[at], z[at]) == labels[at]).mean())
        return float(np.mean(shares))

    best = right(found, "soft k-means")
    assert all(right(sets.Fitted(scale=s), "soft k-means") <= best for s in sets.SCALES)
    best = right(found, "LaplacianShot")
    assert all(right(sets.Fitted(strength=s), "LaplacianShot") <= best for s in sets.STRENGTHS)
    assert found.scale > 1  # z tells these classes, so it is to count


def alone(logits: np.ndarray, z: np.ndarray) -> Relations:
    """A gate that never fires."""
    return Relations(np.exp(logits), False, 1, 0.0, 1.0)


def test_strangers_are_drawn_more_often_and_gains_are_means_over_sets() -> None:
    logits, z, labels = related()
    ways = {"first": lambda logits, z: np.zeros(len(z), int)}
    kinds = [(4, 2), (4, 0)]
    found = dict(sets.judged(alone, ways, logits, z, labels, 3, kinds, strangers=5))
    assert {name: len(each["alone"]) for name, each in found.items()} == {
        "4, 2": 3,
        "4, strangers": 15,
    }
    row = sets.gains(alone, ways, logits, z, labels, 3, kinds)[0]
    at = [sets.drawn(labels, 4, 2, np.random.default_rng([4, 2, n])) for n in range(3)]
    expected = [
        (labels[one] == 0).mean() - (logits[one].argmax(1) == labels[one]).mean() for one in at
    ]
    assert row["first"] == pytest.approx(100 * np.mean(expected))
    assert (row["learned"], row["fired"]) == (0, 0)


def test_differences_are_paired_by_set() -> None:
    """By hand: 10 and 30 points apart; deviation 14.14 (n - 1), over the root of 2."""
    found = sets.difference(np.array([0.5, 0.9]), np.array([0.4, 0.6]))
    assert found == (pytest.approx(20), pytest.approx(10))
