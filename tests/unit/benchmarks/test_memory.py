"""The benchmark of the memory: what its rivals see, what they may lose, its arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.support.benchmarks import benchmark

additions = benchmark("remembering.additions")

OLD, NEW, DIM = 3, 2, 6
COUNTS = {"train": 120, "calibration": 40, "test": 40, "pool": 30, "new_test": 40}
"""Images of each class in a part."""


def features(seed: int = 0) -> dict[str, np.ndarray]:
    """Features of Gaussian classes that overlap, as the benchmark keeps them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((OLD + NEW, DIM)) * 1.5 + 3
    kept: dict[str, np.ndarray] = {"old": np.array(OLD), "classes": np.arange(OLD + NEW)}
    for part, count in COUNTS.items():
        classes = range(OLD, OLD + NEW) if part in ("pool", "new_test") else range(OLD)
        labels = np.repeat(np.array(classes), count)
        x = np.maximum(centres[labels] + rng.standard_normal((len(labels), DIM)), 0)
        kept |= {f"{part}/x": x.astype(np.float32), f"{part}/labels": labels}
        kept[f"{part}/logits"] = (x @ centres[:OLD].T / 5).astype(np.float32)
    return kept


@pytest.fixture(scope="module")
def of() -> Any:
    return additions.Setting(features())


def test_every_rival_sees_all_old_images(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fit_head = additions.fit_head

    def fit(x: np.ndarray, labels: np.ndarray, *more: Any, **named: Any) -> Any:
        seen.append(np.bincount(labels, minlength=OLD).tolist())
        return fit_head(x, labels, *more, **named)

    monkeypatch.setattr(additions, "fit_head", fit)
    rows = of.draw(5, 0)
    additions.retrained(of, rows)
    additions.columns(of, rows)
    additions.imprinting(of, rows)
    old = [COUNTS["train"]] * OLD
    assert seen == [old, [*old, 5, 5], [*old, 5, 5]]  # the old head is kept for all draws


def test_the_retrained_head_is_that_of_another_solver(of: Any) -> None:
    """scikit-learn's, with the same loss: C weighs the sum of losses against half of the squares."""
    rows = of.draw(5, 0)
    scores = additions.retrained(of, rows)["new_test"]
    x = np.concatenate([of.x["train"], of.x["pool"][rows]])
    labels = np.concatenate([of.labels["train"], of.labels["pool"][rows]])
    weight = 1 / np.bincount(labels)[labels] / (OLD + NEW)
    other = LogisticRegression(C=1 / (2 * 1e-3), tol=1e-8, max_iter=5000)
    other.fit(x, labels, sample_weight=weight)
    expected = other.decision_function(of.x["new_test"])
    found = np.concatenate(scores, 1)
    # Logits are defined up to a constant for each image.
    np.testing.assert_allclose(
        found - found.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=0.02
    )


def test_where_a_head_is_started_does_not_change_it(of: Any) -> None:
    x, labels = of.x["train"], of.labels["train"]
    far = np.random.default_rng(1).standard_normal((DIM, OLD)), np.ones(OLD)
    (weights, _), (others, _) = (additions.fit_head(x, labels, None, OLD, s) for s in (None, far))
    np.testing.assert_allclose(weights, others, atol=0.01)


def test_what_may_be_lost_counts_from_the_heads_accuracy_or_from_the_rivals_own() -> None:
    """Ten images; the head has 8 right, the rival 9: of these, one or two may turn for 10 points."""

    class Of:
        labels = {part: np.zeros(10, int) for part in additions.PARTS} | {
            "new_test": np.ones(10, int)
        }
        logits = {"calibration": np.array([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 2)}
        old = 1

    # Old minus new is 1, 2, ... 10; the last image is wrong among the old classes already.
    old = np.stack([np.arange(1.0, 11), np.zeros(10)], 1)
    old[9] = old[9, ::-1]
    scores = dict.fromkeys(additions.PARTS, (old, np.zeros((10, 1))))
    from_own = additions.judged(Of, scores, 10.0, own=True)
    from_heads = additions.judged(Of, scores, 10.0, own=False)
    assert [from_own[0], from_heads[0]] == [80.0, 70.0]
    assert [from_own[1], from_heads[1]] == [10.0, 20.0]


def test_the_share_of_a_rivals_new_accuracy_is_paired_by_draw() -> None:
    """By hand: 15 / 20; what is left of the pairs, 10 - 7.5 and 20 - 22.5, is +-2.5 of 20."""
    ratio, error = additions.share([10.0, 20.0], [10.0, 30.0])
    assert ratio == pytest.approx(75)
    assert error == pytest.approx(1.96 * 100 * 2.5 / 20)
    assert np.isnan(additions.share([1.0, 2.0], [0.0, 0.0])).all()
    assert additions.share([9.0, 18.0, 27.0], [10.0, 20.0, 30.0]) == (
        pytest.approx(90),
        pytest.approx(0, abs=1e-9),
    )
