"""The gate: its measures compared with loops, its level on strangers, what it finds beyond agreement."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cnn2gnn_dist.inference.calibration import softmax
from cnn2gnn_dist.inference.sets import related
from cnn2gnn_dist.inference.sets.logistic import fit_balanced
from cnn2gnn_dist.inference.sets.related import (
    agreement,
    evidence,
    few_classes,
    fit_related,
    related_score,
    rows_by_class,
)
from cnn2gnn_dist.inference.sets.set_gate import SetGate
from tests.unit.inference.test_together import CLASSES, images


@pytest.fixture(scope="module")
def world():
    logits, z, labels = images(
        np.random.default_rng(3), np.random.default_rng(4).integers(0, CLASSES, 1500)
    )
    return softmax(logits, 1.5), z.astype(np.float64), labels


EDGE = (6.0, -2.0)


@pytest.fixture(scope="module")
def gate(world):
    return fit_related(
        *world, EDGE, lambda members: np.full(len(members), 0.06), 0
    )  # 2 of 100 may pass: 0.12 points


def scores(gate, world, sets):
    p, z, _ = world
    return np.array(
        [related_score(gate, p[at], EDGE[0] * (z[at] @ z[at].T) + EDGE[1])[0] for at in sets]
    )


def strangers(world, count, number, seed=9):
    rng = np.random.default_rng(seed)
    return [rng.choice(len(world[0]), count, replace=False) for _ in range(number)]


def test_both_measures_are_means_over_pairs():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), (3, 6))
    log_odds = rng.standard_normal((3, 6, 6))
    log_odds = log_odds + log_odds.transpose(0, 2, 1)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    agree = [np.mean([s[i] @ s[j] for i, j in pairs]) for s in p]
    np.testing.assert_allclose(agreement(p), agree)
    known = [
        np.mean([np.log(1 + 5 * (s[i] @ s[j]) * np.exp(o[i, j])) for i, j in pairs])
        for s, o in zip(p, log_odds, strict=True)
    ]
    np.testing.assert_allclose(evidence(p, log_odds), known)


def test_certain_images_give_no_infinities():
    p = np.eye(4)[None, [0, 1, 2, 2]]
    found = evidence(p, np.zeros((1, 4, 4)))
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(np.log(5) / 6, abs=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "count", [2, 8, 10, 64, 80, 300]
)  # 10: between sizes; 80, 300: above SIZES
def test_two_of_a_hundred_random_sets_pass(gate, world, count):
    found = scores(gate, world, strangers(world, count, 1500))
    assert 0.01 < (found > gate.at(count).threshold).mean() < 0.035


@pytest.mark.thorough
@pytest.mark.parametrize(("count", "classes"), [(4, 1), (8, 2), (16, 3)])
def test_it_finds_more_than_agreement_alone(gate, world, count, classes):
    p, _, labels = world
    rng = np.random.default_rng(1)
    sets = []
    for _ in range(200):
        chosen = rng.choice(CLASSES, classes, replace=False)
        sets.append(rng.choice(np.flatnonzero(np.isin(labels, chosen)), count, replace=False))
    found = (scores(gate, world, sets) > gate.at(count).threshold).mean()
    level = np.quantile(agreement(p[np.stack(strangers(world, count, 1500))]), related.LEVEL)
    alone = (agreement(p[np.stack(sets)]) > level).mean()
    assert found > alone + 0.03


def test_the_threshold_is_where_random_sets_lose_the_limit():
    rng = np.random.default_rng(2)
    score = rng.standard_normal(2000)
    members = np.arange(2000)[:, None]  # sets of one image, which identifies the set
    order = np.argsort(-score)
    for each, passing in ((0.0799, 30), (0.03999, 60), (1.0, 10), (0.001, 200), (-0.5, 200)):
        found = related._affordable(
            score, members, lambda sets, each=each: np.full(len(sets), each)
        )
        assert (score > found).sum() == passing  # 0.0012 * 2000 / each, within 10 to 200
    late = np.zeros(2000)
    late[order[:50]], late[order[50:60]] = 0.01, 1.0
    found = related._affordable(score, members, lambda sets: late[sets[:, 0]])
    assert (score > found).sum() == 51


def test_weights_are_scikit_learns(world):
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((500, 3))
    positive = rows @ [1.0, -2.0, 0.5] + rng.logistic(size=500) > 1
    weights, intercept = fit_balanced(rows, positive)
    model = LogisticRegression(C=1e6, class_weight="balanced", tol=1e-10).fit(rows, positive)
    np.testing.assert_allclose(weights, model.coef_[0], rtol=2e-2)
    assert intercept == pytest.approx(model.intercept_[0], rel=2e-2, abs=1e-2)


def test_sets_of_few_classes_are_drawn_even_where_classes_are_small():
    labels = np.arange(60) // 3  # three images a class
    rng = np.random.default_rng(0)
    for count in (2, 8, 16):
        members = few_classes(rows_by_class(labels), count, rng)
        assert len(set(members)) == count
        assert len(set(labels[members])) <= max(-(-count // 3) + 1, count // 3)


@pytest.mark.thorough
def test_it_is_kept_as_json(gate):
    assert SetGate.from_json(json.loads(json.dumps(gate.to_json()))) == gate
