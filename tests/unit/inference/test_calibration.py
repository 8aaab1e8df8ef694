"""Temperature, scores of unusual images, conformal sets: against scipy, brute force, and their guarantees."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special
from sklearn.metrics import roc_auc_score

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import (
    COLDEST,
    Calibration,
    ConformalSets,
    calibration_error,
    fit_temperature,
    log_softmax,
    softmax,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def drawn(rng, count, classes=6, hot=2.5):
    """Logits whose labels are drawn from softmax(l / hot): the best temperature is near ``hot``."""
    logits = rng.standard_normal((count, classes)).astype(np.float32) * 4
    p = special.softmax(logits.astype(np.float64) / hot, axis=1)
    labels = (rng.random((count, 1)) > p.cumsum(1)).sum(1).clip(max=classes - 1)
    return logits, labels


def test_softmax_is_scipys(rng):
    logits = rng.standard_normal((7, 5)) * 300
    np.testing.assert_allclose(
        softmax(logits, 3.0), special.softmax(logits / 3, axis=1), atol=1e-15
    )
    np.testing.assert_allclose(log_softmax(logits), special.log_softmax(logits, axis=1), rtol=1e-12)


@pytest.mark.parametrize("hot", [0.4, 1.0, 2.5])
def test_temperature_is_the_minimum(rng, hot):
    logits, labels = drawn(rng, 3000, hot=hot)
    temperature = fit_temperature(logits, labels)

    def loss(t: float) -> float:
        log_p = special.log_softmax(logits.astype(np.float64) / t, axis=1)
        return float(-log_p[np.arange(len(labels)), labels].mean())

    found = optimize.minimize_scalar(
        loss,
        bounds=(0.05, 20),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert temperature == pytest.approx(found.x, rel=1e-4)
    assert temperature == pytest.approx(hot, rel=0.15)
    assert loss(temperature) <= found.fun + 1e-9


def test_temperature_without_a_mistake_is_bounded():
    logits = np.eye(4, dtype=np.float32)
    assert fit_temperature(logits, np.arange(4)) == pytest.approx(COLDEST)


def test_temperature_lowers_the_calibration_error(rng):
    logits, labels = drawn(rng, 4000, hot=3.0)
    right = logits.argmax(1) == labels
    fitted = calibration_error(softmax(logits, fit_temperature(logits, labels)).max(1), right)
    assert fitted < 0.03 < calibration_error(softmax(logits).max(1), right)


def test_calibration_error_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    # Bins: two images at .9, one of them right; one at .6, right.
    right = p.argmax(1) == np.array([0, 1, 1])
    assert calibration_error(p.max(1), right, bins=10) == pytest.approx((2 * 0.4 + 0.4) / 3)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.99), st.integers(0, 99))
def test_quantile_is_the_smallest_that_covers(count, coverage, seed):
    p = np.random.default_rng(seed).dirichlet(np.ones(3), count)
    sets = ConformalSets.fit(p, np.zeros(count, int))
    scores = 1 - p[:, 0]
    enough = [s for s in scores if (scores <= s).sum() >= (count + 1) * coverage - 1e-9]
    if enough:
        assert sets.threshold(coverage) == min(enough)
    else:
        with pytest.raises(UserError, match="calibration images"):
            sets.threshold(coverage)


def test_coverage_is_exact_in_decimal():
    # (99 + 1) · 0.95 is 95, not 96, which rounding up an inexact product may give.
    p = np.stack([np.linspace(0.99, 0.01, 99), np.linspace(0.01, 0.99, 99)], 1)
    assert ConformalSets.fit(p, np.zeros(99, int)).threshold(0.95) == np.sort(1 - p[:, 0])[94]


@pytest.mark.thorough
@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_coverage_holds_on_exchangeable_images(coverage):
    """The mean over many draws of both halves is in [coverage, coverage + 1/(n+1)], T fitted on the same images."""
    rng = np.random.default_rng(5)
    count, covered = 150, []
    for _ in range(300):
        logits, labels = drawn(rng, count + 100)
        model = Calibration.fit(logits[:count], labels[:count])
        sets = model.sets.sets(model.probabilities(logits[count:]), coverage)
        covered.append(sets[np.arange(100), labels[count:]].mean())
    error = 3 * np.std(covered) / np.sqrt(len(covered))
    assert coverage - error <= np.mean(covered) <= coverage + 1 / (count + 1) + error


def test_sets_grow_with_the_coverage(rng):
    logits, labels = drawn(rng, 500)
    model = Calibration.fit(logits, labels)
    p = model.probabilities(logits)
    small, large = model.sets.sets(p, 0.6), model.sets.sets(p, 0.95)
    assert (small <= large).all()
    assert (large.sum(1) != 1).any()


def test_empty_sets_where_nothing_is_likely():
    p = np.tile([0.9, 0.05, 0.05], (100, 1))
    sets = ConformalSets.fit(p, np.zeros(100, int))
    asked = np.array([[0.95, 0.03, 0.02], [0.4, 0.3, 0.3]])
    assert sets.sets(asked, 0.9).tolist() == [[True, False, False], [False, False, False]]


def test_coverage_that_is_out_of_reach():
    sets = ConformalSets.fit(np.tile([0.8, 0.2], (18, 1)), np.zeros(18, int))
    with pytest.raises(
        UserError, match="at least 19 calibration images, and there are 18"
    ) as error:
        sets.threshold(0.95)
    assert "at most 0.9473" in error.value.remedy
    assert sets.threshold(0.9473) == pytest.approx(0.2)  # the remedy works
    more = ConformalSets.fit(np.tile([0.8, 0.2], (19, 1)), np.zeros(19, int))
    assert more.threshold(0.95) == pytest.approx(0.2)  # and so does one image more


@pytest.mark.parametrize("coverage", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_invalid_coverages(coverage):
    with pytest.raises(UserError, match="coverage"):
        ConformalSets(np.zeros(9)).threshold(coverage)


def test_no_calibration_images():
    with pytest.raises(UserError, match="no calibration images"):
        Calibration.fit(np.zeros((0, 3)), np.zeros(0, int))


def test_scores_of_the_unusual(rng):
    logits, labels = drawn(rng, 200, classes=3)
    distances = rng.random(200)
    model = Calibration.fit(logits, labels, distances)
    vote = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])
    asked = np.array([[9.0, 0, 0], [0, 0, 9.0]])
    p = special.softmax(asked / model.temperature, axis=1)
    found = model.unusual(p, np.array([0.5, 7.0]), vote)
    np.testing.assert_allclose(found.softmax_B, 1 - p.max(1))
    np.testing.assert_allclose(found.distance_B, [(distances <= 0.5).sum() / 201, 200 / 201])
    np.testing.assert_allclose(found.vote_B, [0.3, 1.0])
    above_one = np.array([[1 + 1e-7, 0, 0], [0, 0, 1.0]])  # a sum of float32 weights
    assert str(model.unusual(p, None, above_one).vote_B.tolist()) == "[0.0, 0.0]"
    nothing = model.unusual(p)
    assert nothing.distance_B is None
    assert nothing.vote_B is None


def test_distance_ranks_as_the_distances_do(rng):
    logits, labels = drawn(rng, 400)
    model = Calibration.fit(logits, labels, rng.random(400))
    near, far = rng.random(300), rng.random(300) + 0.3
    found = model.unusual(np.zeros((600, 6)), np.concatenate([near, far])).distance_B
    assert found is not None
    strange = np.repeat([0, 1], 300)
    whole = roc_auc_score(strange, np.concatenate([near, far]))
    assert roc_auc_score(strange, found) == pytest.approx(
        whole, abs=0.06
    )  # not equal: beyond the largest calibration distance there are ties
    assert (found >= 0).all()
    assert (found < 1).all()


def test_rows_do_not_depend_on_company(rng):
    logits, labels = drawn(rng, 300)
    model = Calibration.fit(logits, labels)
    whole = model.probabilities(logits)
    alone = np.concatenate([model.probabilities(row[None]) for row in logits])
    assert whole.tobytes() == alone.tobytes()


def test_kept_as_json(rng):
    logits, labels = drawn(rng, 100)
    model = Calibration.fit(logits, labels, rng.random(100))
    again = Calibration.from_json(json.loads(json.dumps(model.to_json())))
    assert again.temperature == model.temperature
    assert again.sets.scores_n.tobytes() == model.sets.scores_n.tobytes()
    assert again.distances_n.tobytes() == model.distances_n.tobytes()
