"""Sets answered by the learned network: its formula by loops, what it must not depend on, and what it gains."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import special

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import log_softmax, softmax
from cnn2gnn_dist.inference.sets import learned, set_network
from cnn2gnn_dist.inference.sets.compositions import Kind, draw
from cnn2gnn_dist.inference.sets.learned import LearnedSets
from cnn2gnn_dist.inference.sets.related import rows_by_class
from cnn2gnn_dist.inference.sets.set_network import ALPHA, ROUNDS, SetNetwork

CLASSES, DIM = 12, 16


def images(rng, labels):
    """Logits, features and labels of a poor classifier (about half are right)."""
    centres = np.random.default_rng(1).standard_normal((CLASSES, DIM))
    z = centres[labels] + 1.3 * rng.standard_normal((len(labels), DIM))
    logits = 0.25 * z @ centres.T + 0.8 * rng.standard_normal((len(labels), CLASSES))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return logits.astype(np.float32), z.astype(np.float32), labels


@pytest.fixture(scope="module")
def world():
    return images(np.random.default_rng(3), np.random.default_rng(4).integers(0, CLASSES, 1200))


@pytest.fixture(scope="module")
def rule(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "SIZES", (2, 3, 4, 8, 16, 32))
        patch.setattr(learned, "_PER_SIZE", 20_000)
        return LearnedSets.fit(*world, steps=300)


@pytest.fixture
def network():
    torch.manual_seed(5)
    made = SetNetwork(largest=8).double()
    for value in made.parameters():
        torch.nn.init.normal_(value, std=0.7)
    return made.eval()


def given(count, sets=1, seed=0):
    rng = np.random.default_rng(seed)
    log_p = log_softmax(rng.standard_normal((sets * count, CLASSES))).reshape(sets, count, CLASSES)
    odds = rng.standard_normal((sets, count, count))
    return torch.from_numpy(log_p), torch.from_numpy(odds + odds.transpose(0, 2, 1))


def by_loops(network, a, o):
    """The module's formulas as they are written, one number at a time."""
    kept = {name: value.numpy() for name, value in network.state_dict().items()}
    count, classes = a.shape

    def silu(x):
        return x * special.expit(x)

    def perceptron(name, x):
        hidden = silu(kept[f"{name}.0.weight"] @ x + kept[f"{name}.0.bias"])
        return kept[f"{name}.2.weight"] @ hidden + kept[f"{name}.2.bias"]

    def entropy(p):
        return -sum(x * np.log(x + 1e-6) for x in p)

    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]

    def about(q):
        agree = np.log(np.maximum(classes * q @ q.T, 1e-6))
        return agree, np.array(
            [
                np.log(min(count, network.largest)) - 2.5,
                np.mean([agree[p] for p in pairs]) / 3,
                np.mean([o[p] for p in pairs]) / 2,
                np.mean([np.logaddexp(0, agree[p] + o[p]) for p in pairs]) / 3,
                np.log(classes) - entropy(q.mean(0)),
                np.mean([entropy(row) for row in q]),
            ]
        )

    s, first = a.copy(), about(special.softmax(a, axis=1))[1]
    opened = special.expit(perceptron("opening", first)[0])
    for r in range(ROUNDS):
        q = special.softmax(s, axis=1)
        agree, u = about(q)
        share, logit, vote = np.logaddexp(0, perceptron(f"gate.{r}", u))
        prior = (q.sum(0) + ALPHA) / (count + classes * ALPHA)
        new = np.empty_like(s)
        for i in range(count):
            heard = np.zeros(classes)
            for j in range(count):
                if i != j:
                    pair = kept[f"pair.{r}.weight"] @ [o[i, j] / 2, agree[i, j] / 3]
                    hidden = silu(pair + kept[f"pair.{r}.bias"] + kept[f"about.{r}.weight"] @ u)
                    w = special.expit(
                        (kept[f"edge.{r}.weight"] @ hidden + kept[f"edge.{r}.bias"])[0]
                    )
                    heard += w * (logit * a[j] + vote * q[j])
            heard *= min(1, (network.largest - 1) / (count - 1))
            new[i] = a[i] + opened * (share * np.log(classes * prior) + heard)
        s = new
    last = about(special.softmax(s, axis=1))[1]
    return special.log_softmax(s, axis=1), perceptron("related", np.concatenate([first, last]))[0]


@pytest.mark.parametrize("count", [2, 7, 20])  # 20: larger than the sets it learns from
def test_the_formula(network, count):
    log_p, odds = given(count)
    with torch.no_grad():
        found, score = network(log_p, odds)
    expected, expected_score = by_loops(network, log_p[0].numpy(), odds[0].numpy())
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-9)
    assert float(score[0]) == pytest.approx(expected_score, abs=1e-9)


def test_slices_of_rows_are_as_the_whole(network, monkeypatch):
    log_p, odds = given(13, sets=3)
    with torch.no_grad():
        whole = network(log_p, odds)
        monkeypatch.setattr(set_network, "_CELLS", 3 * 13 * 2 * set_network.HIDDEN)
        sliced = network(log_p, odds)
    for one, other in zip(whole, sliced, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_neither_the_order_of_images_nor_of_classes_matters(network):
    log_p, odds = given(9)
    rng = np.random.default_rng(1)
    images_m, classes_C = rng.permutation(9), rng.permutation(CLASSES)
    with torch.no_grad():
        found, score = network(log_p, odds)
        permuted, other = network(
            log_p[:, images_m][:, :, classes_C], odds[:, images_m][:, :, images_m]
        )
    torch.testing.assert_close(permuted, found[:, images_m][:, :, classes_C], rtol=0, atol=1e-12)
    torch.testing.assert_close(other, score, rtol=0, atol=1e-12)


def test_certain_images_give_finite_gradients():
    network = SetNetwork(8)
    log_p = torch.full((1, 4, 3), -200.0)
    log_p[:, :, 1] = 0.0
    out, score = network(log_p, torch.zeros(1, 4, 4))
    (out[..., 1].sum() + score.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.thorough
def test_strangers_are_answered_alone(rule):
    """Where the set isn't related, each answer is bit-identical to that of the image alone."""
    fired = 0
    for seed in range(100):
        rng = np.random.default_rng([seed, 7])
        logits, z, _ = images(rng, rng.choice(CLASSES, 10, replace=False))
        found = rule(logits, z)
        fired += found.related
        if not found.related:
            alone = [rule(logits[i : i + 1], z[i : i + 1]).posterior_mC for i in range(10)]
            assert found.posterior_mC.tobytes() == np.concatenate(alone).tobytes()
    assert fired <= 10


@pytest.mark.parametrize(("count", "classes"), [(2, 1), (4, 1), (16, 1), (16, 3), (24, 2)])
def test_related_images_gain(rule, count, classes):
    """They gain over single images; where all are of one class, nearly as much as by the mean of logits."""
    right = np.zeros(3)
    for seed in range(80):
        rng = np.random.default_rng([seed, count])
        labels = rng.choice(CLASSES, classes, replace=False)[np.arange(count) % classes]
        logits, z, _ = images(rng, labels)
        together = rule(logits, z).posterior_mC.argmax(1)
        mean = rule.same(logits).posterior_mC.argmax(1)
        right += [np.mean(answer == labels) for answer in (logits.argmax(1), mean, together)]
    alone, mean, together = right / 80
    assert together > alone + (0.02 if count < 4 else 0.08)
    if classes == 1 and count > 4:  # fewer images are too little evidence to score above strangers
        assert together > mean - 0.08


@pytest.mark.parametrize("count", [10, 32, 100])
def test_strangers_lose_next_to_nothing(rule, count):
    """Even in sets larger than any that it learned from."""
    lost = []
    for seed in range(60):
        rng = np.random.default_rng([seed, count, 3])
        logits, z, labels = images(rng, rng.integers(0, CLASSES, count))
        together = rule(logits, z).posterior_mC.argmax(1)
        lost.append(np.mean(logits.argmax(1) == labels) - np.mean(together == labels))
    assert np.mean(lost) < 0.01


def test_same_class_is_known(rule):
    logits, _, _ = images(np.random.default_rng(2), np.zeros(5, int))
    found = rule.same(logits)
    mean = special.softmax(logits.astype(np.float64).mean(0) / rule.temperature)
    np.testing.assert_allclose(found.posterior_mC, np.tile(mean, (5, 1)))
    assert (found.related, found.classes) == (True, 1)


def test_one_image_and_none(rule):
    logits, z, _ = images(np.random.default_rng(2), np.zeros(1, int))
    found = rule(logits, z)
    assert not found.related
    np.testing.assert_array_equal(found.posterior_mC, softmax(logits, rule.temperature))
    assert rule(logits[:0], z[:0]).posterior_mC.shape == (0, CLASSES)


def test_fitting_repeats_and_leaves_torch_as_it_was(world, monkeypatch):
    monkeypatch.setattr(learned, "_STRANGERS", 100)
    monkeypatch.setattr(learned, "_PER_SIZE", 1000)
    some = [a[:200] for a in world]
    torch.manual_seed(11)
    before = torch.get_rng_state(), torch.get_num_threads()
    one, same, other = (LearnedSets.fit(*some, steps=3, seed=s).to_json() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    assert one == same
    assert one != other


def test_it_is_kept_as_json(rule):
    again = LearnedSets.from_json(json.loads(json.dumps(rule.to_json())))
    logits, z, _ = images(np.random.default_rng(8), np.arange(24) % 3)
    one, other = rule(logits, z), again(logits, z)
    assert one.related
    assert one.posterior_mC.tobytes() == other.posterior_mC.tobytes()
    assert dataclasses.astuple(one)[1:] == dataclasses.astuple(other)[1:]


def test_weights_of_another_network_are_refused(rule):
    kept = rule.to_json()
    kept["network"]["weights"].pop("related.0.bias")
    with pytest.raises(ValueError, match=r"related\.0\.bias"):
        LearnedSets.from_json(kept)


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 3], [0, 0, 0, 0]])
def test_too_few_to_fit(labels):
    count = len(labels)
    with pytest.raises(UserError, match="how similar"):
        LearnedSets.fit(np.zeros((count, 4)), np.eye(count, 4), np.array(labels))


@pytest.mark.parametrize("count", [2, 5, 16])
def test_kinds_of_sets(count):
    labels = np.random.default_rng(0).integers(0, CLASSES, 600)
    of_class, rng = rows_by_class(labels), np.random.default_rng(1)
    found = {kind: [] for kind in Kind}
    for kind in Kind:
        for _ in range(200):
            members, made = draw(of_class, count, kind, rng)
            assert made is kind
            assert len(np.unique(members)) == len(members) == count
            found[kind].append(len(np.unique(labels[members])))
    assert set(found[Kind.BURST]) == {1}
    assert set(found[Kind.MIXTURE]) == set(range(2, max(2, count // 2) + 1))
    classes = CLASSES * (1 - (1 - 1 / CLASSES) ** count)
    assert np.mean(found[Kind.STRANGERS]) == pytest.approx(classes, abs=0.25)


def test_sets_are_drawn_even_where_classes_are_small():
    labels = np.repeat(np.arange(10), 3)
    of_class, rng = rows_by_class(labels), np.random.default_rng(0)
    for kind in Kind:
        for _ in range(50):
            members, _ = draw(of_class, 8, kind, rng)
            assert len(np.unique(members)) == 8
            if kind is Kind.BURST:
                assert len(np.unique(labels[members])) >= 3


def test_sets_that_classes_are_too_small_for_count_as_strangers():
    labels = np.repeat(np.arange(100), 3)
    of_class, rng = rows_by_class(labels), np.random.default_rng(0)
    burst, kinds = [], []
    for _ in range(30):
        members, kind = draw(of_class, 64, Kind.BURST, rng)  # 20 tries reach 20 classes: 60 images
        burst.append(len(np.unique(labels[members])))
        kinds.append(kind)
    assert set(kinds) == {Kind.STRANGERS}
    assert np.mean(burst) > 40
