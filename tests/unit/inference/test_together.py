"""Sets answered together: compared with dense loops and scikit-learn, and what holds for any set."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy import special
from sklearn.linear_model import LogisticRegression

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.sets import one_class, related
from cnn2gnn_dist.inference.sets.together import EDGES, ROUNDS, Together

CLASSES, DIM = 12, 16


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def world():
    """Logits, features and labels of 1,500 images of a poor classifier (about half are right)."""
    return images(np.random.default_rng(3), np.random.default_rng(4).integers(0, CLASSES, 1500))


def fit_from(strangers, learned, sets, *world, **options):
    """Gates fitted on fewer sets than a model's; ``test_related.py`` checks the level of the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(related, "_STRANGERS", strangers)
        patch.setattr(related, "_LEARNED", learned)
        patch.setattr(one_class, "_SETS", sets)
        return Together.fit(*world, **options)


@pytest.fixture(scope="module")
def rule(world):
    return fit_from(1000, 800, 600, *world)


def quickly(*world, **options):
    """A rule for tests in which the gates don't matter."""
    return fit_from(100, 100, 100, *world, **options)


def images(rng, labels):
    centres = np.random.default_rng(1).standard_normal((CLASSES, DIM))
    z = centres[labels] + 1.3 * rng.standard_normal((len(labels), DIM))
    logits = 0.25 * z @ centres.T + 0.8 * rng.standard_normal((len(labels), CLASSES))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return logits.astype(np.float32), z.astype(np.float32), labels


def by_loops(rule, logits, z):
    """Rule T as its formula is written, one number at a time."""
    count, classes = logits.shape
    a = logits.astype(np.float64) / rule.temperature
    w = np.zeros((count, count))
    for i in range(count):
        row = {
            j: max(
                2 * special.expit(rule.slope * float(z[i].astype(float) @ z[j]) + rule.offset) - 1,
                0,
            )
            for j in range(count)
            if j != i
        }
        for j in sorted(row, key=lambda j: (-row[j], j))[:EDGES]:
            w[i, j] = row[j]
        w[i] /= max(w[i].sum(), 1)
    q = special.softmax(a, axis=1)
    for _ in range(ROUNDS):
        prior = [
            (sum(q[i, c] for i in range(count)) + rule.alpha) / (count + classes * rule.alpha)
            for c in range(classes)
        ]
        raw = np.zeros_like(q)
        for i in range(count):
            for c in range(classes):
                company = sum(w[i, j] * q[j, c] for j in range(count))
                raw[i, c] = a[i, c] + np.log(classes * prior[c]) + rule.strength * company
        q = special.softmax(raw, axis=1)
    return q


@pytest.mark.parametrize("count", [2, 8, 20])
def test_the_formula(rule, count):
    logits, z, _ = images(np.random.default_rng(count), np.zeros(count, int))
    open_gate = dataclasses.replace(rule, gate=None, one_class=None)
    found = open_gate(logits, z)
    assert found.related
    np.testing.assert_allclose(found.posterior_mC, by_loops(rule, logits, z), atol=1e-9)


def test_edges_are_scikit_learns_logistic_regression(world):
    logits, z, labels = (a[:300] for a in world)
    rule = quickly(logits, z, labels)
    i, j = np.triu_indices(300, 1)
    cos = (z.astype(np.float64) @ z.T)[i, j]
    model = LogisticRegression(C=1e5, class_weight="balanced", tol=1e-10, max_iter=500)
    model.fit(cos[:, None], labels[i] == labels[j])
    assert rule.slope == pytest.approx(model.coef_[0, 0], rel=2e-3)
    assert rule.offset == pytest.approx(model.intercept_[0], rel=2e-3, abs=2e-3)


def test_the_order_of_images_does_not_matter(rule):
    logits, z, _ = images(np.random.default_rng(8), np.arange(24) % 3)
    order = np.random.default_rng(0).permutation(24)
    found, permuted = rule(logits, z), rule(logits[order], z[order])
    assert found.related
    np.testing.assert_allclose(permuted.posterior_mC, found.posterior_mC[order], atol=1e-12)
    assert permuted.classes == found.classes


def test_strangers_are_answered_alone(rule):
    """Where the gate doesn't fire, each answer is bit-identical to that of the image alone."""
    fired = 0
    for seed in range(100):
        rng = np.random.default_rng([seed, 7])
        logits, z, _ = images(rng, rng.choice(CLASSES, 10, replace=False))
        found = rule(logits, z)
        fired += found.related
        if not found.related:
            alone = [rule(logits[i : i + 1], z[i : i + 1]).posterior_mC for i in range(10)]
            assert found.posterior_mC.tobytes() == np.concatenate(alone).tobytes()
    assert fired <= 5


@pytest.mark.parametrize(("count", "classes"), [(8, 1), (16, 2), (32, 3)])
def test_related_images_gain(rule, count, classes):
    right = np.zeros(3)
    open_gate = dataclasses.replace(rule, gate=None, one_class=None)
    for seed in range(60):
        rng = np.random.default_rng([seed, count])
        labels = rng.choice(CLASSES, classes, replace=False)[np.arange(count) % classes]
        logits, z, _ = images(rng, labels)
        alone, found = logits.argmax(1), open_gate(logits, z).posterior_mC.argmax(1)
        gated = rule(logits, z).posterior_mC.argmax(1)
        right += [np.mean(answer == labels) for answer in (alone, gated, found)]
    assert right[2] > right[1] > right[0] + 60 * 0.02


@pytest.mark.parametrize("count", [8, 16, 24])  # 24: between two fitted sizes
def test_a_set_of_one_class_is_answered_by_its_mean(rule, count):
    """Without being told that it is one; sets of two classes keep their mixture."""
    found = {1: 0, 2: 0}
    for seed in range(100):
        for classes in found:
            rng = np.random.default_rng([seed, count, classes])
            labels = rng.choice(CLASSES, classes, replace=False)[np.arange(count) % classes]
            logits, z, _ = images(rng, labels)
            answer = rule(logits, z)
            same = rule.same(logits).posterior_mC
            if answer.related and answer.posterior_mC.tobytes() == same.tobytes():
                found[classes] += 1
                assert answer.classes == 1
    assert found[1] > 60
    assert found[2] <= 8


def test_number_of_classes(rule):
    logits = np.zeros((6, CLASSES), np.float32)
    logits[np.arange(6), [0, 0, 0, 5, 5, 5]] = 9.0
    z = np.zeros((6, DIM), np.float32)
    z[:3, 0] = z[3:, 1] = 1.0
    found = rule(logits, z)
    assert found.related
    assert found.classes == 2


def test_same_class_is_known(rule):
    logits, _, _ = images(np.random.default_rng(2), np.zeros(5, int))
    found = rule.same(logits)
    mean = special.softmax(logits.astype(np.float64).mean(0) / rule.temperature)
    np.testing.assert_allclose(found.posterior_mC, np.tile(mean, (5, 1)))
    assert found.related
    assert found.classes == 1


def test_one_image_and_none(rule):
    logits, z, _ = images(np.random.default_rng(2), np.zeros(1, int))
    for found in (rule(logits, z), rule.same(logits)):
        assert not found.related
        np.testing.assert_allclose(
            found.posterior_mC, special.softmax(logits / rule.temperature, axis=1), rtol=1e-6
        )
    nothing = rule(logits[:0], z[:0])
    assert nothing.posterior_mC.shape == (0, CLASSES)
    assert nothing.classes == 0


def test_fitting_repeats(world):
    some = [a[:300] for a in world]
    assert quickly(*some) == quickly(*some)
    assert quickly(*some) != quickly(*some, seed=1)


def test_it_is_kept_as_json(rule):
    assert Together.from_json(json.loads(json.dumps(rule.to_json()))) == rule
    ungated = dataclasses.replace(rule, gate=None, one_class=None)
    assert Together.from_json(json.loads(json.dumps(ungated.to_json()))) == ungated


def test_models_from_before_the_gate_was_learned_are_read(rule):
    kept = {k: v for k, v in rule.to_json().items() if k not in ("gate", "one_class")}
    old = Together.from_json(kept | {"sizes": [2, 64], "thresholds": [0.5, 0.2]})
    p = np.eye(CLASSES)[[3, 3, 3, 7]]
    found = old(20 * p, np.eye(4, DIM))
    assert found.score == pytest.approx(0.5)  # three of six pairs agree
    assert found.threshold == pytest.approx(np.interp(np.log(4), np.log([2, 64]), [0.5, 0.2]))
    assert found.related


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 3], [0, 0, 0, 0]])
def test_too_few_to_fit(labels):
    count = len(labels)
    with pytest.raises(UserError, match="how similar"):
        Together.fit(np.zeros((count, 4)), np.eye(count, 4), np.array(labels))
