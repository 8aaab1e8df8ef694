"""Uneven classes of training in sets of images: against Gaussian classes, whose posteriors are known."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from cnn2gnn_dist.inference import scoring
from cnn2gnn_dist.inference.calibration import Calibration, softmax
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.sets import learned
from cnn2gnn_dist.inference.sets.class_shares import are_uneven, shift_of
from cnn2gnn_dist.inference.sets.learned import LearnedSets

CLASSES, DIM = 10, 16
SHARES = 0.6 ** np.arange(CLASSES)
SHARES /= SHARES.sum()
MEANS = 0.6 * np.random.default_rng(0).normal(size=(CLASSES, DIM))


def images(labels, rng):
    return MEANS[labels] + rng.normal(size=(*np.shape(labels), DIM))


def likelihood(x):
    return -0.5 * np.square(x[..., None, :] - MEANS).sum(-1)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def world():
    """Calibration images of a network that is exactly right: logits log p(x | c) + log share."""
    rng = np.random.default_rng(1)
    labels = rng.choice(CLASSES, 1200, p=SHARES)
    x = images(labels, rng)
    return likelihood(x) + np.log(SHARES), unit(x), labels


@pytest.fixture(scope="module")
def rule(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "SIZES", (2, 4, 8, 16))
        patch.setattr(learned, "_PER_SIZE", 10_000)
        return LearnedSets.fit(*world, temperature=1.0, steps=400)


def test_the_shares_that_logits_contain_are_found(world):
    """All of them in a plain network's, none in one that was trained with logit_adjust=1; at any temperature."""
    logits, _, labels = world
    found = np.bincount(labels, minlength=CLASSES) / len(labels)
    wanted = -np.log(found) + np.log(found).mean()
    for contains in (1.0, 0.4, 0.0):
        own = logits - (1 - contains) * np.log(SHARES)
        for temperature in (1.0, 3.0):
            shift = shift_of(own * temperature, labels, temperature)
            np.testing.assert_allclose(shift, contains * wanted, atol=0.1 * wanted.max())


def test_even_classes_have_no_shift():
    for count, uneven in (([20, 15, 10], False), ([21, 15, 10], True), ([3, 3, 0], True)):
        labels = np.repeat(np.arange(3), count)
        assert are_uneven(labels, 3) == uneven
        assert (shift_of(np.zeros((len(labels), 3)), labels, 1.0) is None) != uneven


@pytest.mark.parametrize(
    "shares", [SHARES, np.full(CLASSES, 1 / CLASSES)], ids=["as_trained", "even"]
)
def test_sets_of_one_class_are_answered_as_bayes_does(rule, shares):
    """16 images known to be of one class: the mean of their logits counted the class's share 16 times (70 %)."""
    rng = np.random.default_rng(2)
    labels = rng.choice(CLASSES, 300, p=shares)
    x = images(np.repeat(labels[:, None], 16, 1), rng)
    bayes = (likelihood(x).sum(1) + np.log(SHARES)).argmax(1)
    found = np.array(
        [rule.same(one).posterior_mC[0].argmax() for one in likelihood(x) + np.log(SHARES)]
    )
    assert (bayes == labels).mean() > 0.99
    assert (found == labels).mean() > 0.99


def test_a_burst_of_any_class_is_answered_better_than_alone(rule):
    """Without the shift 70 % of these images were right together, 57 % alone."""
    rng = np.random.default_rng(3)
    alone, together = [], []
    for label in np.arange(60) % CLASSES:
        x = images(np.full(16, label), rng)
        logits = likelihood(x) + np.log(SHARES)
        alone.append((logits.argmax(1) == label).mean())
        together.append((rule(logits, unit(x)).posterior_mC.argmax(1) == label).mean())
    assert np.mean(alone) < 0.65
    assert np.mean(together) > 0.85


def test_strangers_and_single_images_are_answered_as_alone(rule):
    rng = np.random.default_rng(4)
    right = np.zeros(2)
    for _ in range(200):
        labels = rng.choice(CLASSES, 8, p=SHARES)
        x = images(labels, rng)
        logits = likelihood(x) + np.log(SHARES)
        right += [
            (logits.argmax(1) == labels).mean(),
            (rule(logits, unit(x)).posterior_mC.argmax(1) == labels).mean(),
        ]
    assert right[1] > right[0] - 0.02 * 200
    one = logits[:1]
    np.testing.assert_array_equal(rule.same(one).posterior_mC, softmax(one))
    np.testing.assert_array_equal(rule(one, unit(x[:1])).posterior_mC, softmax(one))


def test_the_shift_is_kept_and_its_lack_in_an_earlier_model_is_named(rule, world, tmp_path, caplog):
    logits, z, labels = world
    kept = json.loads(json.dumps(rule.to_json()))
    np.testing.assert_array_equal(LearnedSets.from_json(kept).shift_C, rule.shift_C)
    earlier = {name: value for name, value in kept.items() if name != "shift"}
    calibration = Calibration.fit(logits, labels).to_json()
    for name in (artefact.CONFIG, artefact.WEIGHTS):  # not read here
        (tmp_path / name).touch()
    np.savez(tmp_path / artefact.CALIBRATION, logits=logits, x=z, z=z, label=labels)
    for together, named in ((kept, False), (earlier, True)):
        tree = {"calibration": calibration, "together": together, "zero": [0.0] * DIM}
        (tmp_path / scoring.FITTED).write_text(json.dumps(tree))
        artefact.write_checksums(tmp_path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            scoring.Scoring.read(tmp_path).rule_together(None)
        assert ("classes are uneven" in caplog.text) == named
