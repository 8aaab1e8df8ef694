"""New classes without training: compared with scipy's densities and brute force; what must hold for edits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import special
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import log_softmax
from cnn2gnn_dist.inference.memory.new_class_scores import PENALTY, learned_columns
from cnn2gnn_dist.inference.memory.new_classes import NewClasses, _offset
from cnn2gnn_dist.inference.memory.old_classes import DIRECTION, Features, Images, OldClasses

OLD, NEW, DIM = 9, 4, 12
CENTRES = np.random.default_rng(1).standard_normal((OLD + NEW, DIM))


def drawn(seed, classes, each):
    """Images and labels: z around class centers, logits of a head that knows the old classes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(classes, each)
    x = CENTRES[labels] + 0.8 * rng.standard_normal((len(labels), DIM))
    logits = 1.5 * x @ CENTRES[:OLD].T - 0.75 * np.square(CENTRES[:OLD]).sum(1)
    return Images(logits.astype(np.float32), x.astype(np.float32)), labels


@pytest.fixture(scope="module")
def world():
    """Rows of the memory, the old classes' model, calibration images and their labels."""
    memory, labels = drawn(0, np.arange(OLD), 150)
    calibration, calibration_labels = drawn(1, np.arange(OLD), 80)
    old = OldClasses.fit(memory.x_nD, labels, calibration, calibration_labels)
    return memory, old, calibration, calibration_labels


def entries(each, new=NEW, seed=2):
    return {f"new {k}": drawn([seed, k], np.array([OLD + k]), each)[0] for k in range(new)}


def fitted(world, of, **options):
    memory, old, calibration, labels = world
    return NewClasses.fit(old, of, calibration, labels, replay=memory, **options)


def accuracies(world, new_classes, seed=50):
    """Old and new accuracy on fresh images."""
    _, old, _, _ = world
    found = []
    for classes in (np.arange(OLD), OLD + np.arange(len(new_classes.names))):
        images, labels = drawn(seed, classes, 100)
        scores = new_classes.scores(old, images.logits_nC, images.x_nD)
        found.append((scores.argmax(1) == labels).mean())
    return found


def placed(old, x):
    """F and y, as their formulas are written."""
    f = x.astype(np.float64) - old.zero_D
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    return f, (f - old.centre_D) @ old.axes_DD.T


def test_densities_are_scipys(world):
    """p(f | n images of mean y), integrated over the class mean by the formulas of the joint normal."""
    _, old, calibration, _ = world
    rng = np.random.default_rng(3)
    means, counts = 0.3 * rng.standard_normal((3, DIM)), [1, 4, 50]
    features = old.features(calibration.x_nD[:5])
    _, y = placed(old, calibration.x_nD[:5])
    _, found = old.scorer(means, np.array(counts)).of_each(features)
    b, inverse = old.between_D, np.linalg.inv(old.axes_DD)
    for k, n in enumerate(counts):
        # (image, mean of n images) is jointly normal: variances b + 1 and b + 1/n, covariance b.
        centre = b / (b + 1 / n) * (old.axes_DD @ (means[k] - old.centre_D))
        spread = b + 1 - b * b / (b + 1 / n)
        expected = multivariate_normal(centre, np.diag(spread)).logpdf(y)
        constant = -0.5 * DIM * np.log(2 * np.pi)
        np.testing.assert_allclose(found[:, k], expected - constant, rtol=1e-9)
    np.testing.assert_allclose(y @ inverse.T + old.centre_D, features.f_BD, atol=1e-9)


def test_own_class_is_each_class(world):
    _, old, calibration, _ = world
    features = old.features(calibration.x_nD[:OLD])
    each, own = old.known.of_each(features), old.known.of_own(features)
    for of_each, of_own in zip(each, own, strict=True):
        np.testing.assert_allclose(np.diag(of_each), of_own, rtol=1e-9)
    assert isinstance(features, Features)


def test_axes_make_classes_white(world):
    memory, old, _, _ = world
    f, y = placed(old, memory.x_nD)
    labels = np.repeat(np.arange(OLD), 150)
    means = np.array([f[labels == c].mean(0) for c in range(OLD)])
    np.testing.assert_allclose(old.mean_CD, means, atol=1e-9)
    centres = (means - old.centre_D) @ old.axes_DD.T
    inside = y - centres[labels]
    np.testing.assert_allclose(
        inside.T @ inside / (len(y) - OLD), np.eye(DIM), atol=0.15
    )  # the ridge
    b = np.diag(centres.T @ centres / (OLD - 1))
    np.testing.assert_allclose(old.between_D, b / 2 + b.mean() / 2, atol=1e-9)


def test_scores_are_the_formula(world):
    _, old, calibration, _ = world
    of = entries(3)
    new_classes = fitted(world, of)
    asked = calibration[np.arange(0, 700, 50)]
    scores = new_classes.scores(old, asked.logits_nC, asked.x_nD)
    np.testing.assert_array_equal(scores[:, :OLD], log_softmax(asked.logits_nC, old.temperature))
    f, y = placed(old, asked.x_nD)
    means = np.concatenate([old.mean_CD, [placed(old, i.x_nD)[0].mean(0) for i in of.values()]])
    cos = DIRECTION * f @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    density = []
    for mean, n in zip(means, [*old.count_C, *[3] * NEW], strict=True):
        spread = old.between_D / (1 + n * old.between_D)
        centre = n * spread * (old.axes_DD @ (mean - old.centre_D))
        density.append(multivariate_normal(centre, np.diag(1 + spread)).logpdf(y))
    density = old.sharpness * np.stack(density, 1)
    odds = density[:, OLD:] - special.logsumexp(density[:, :OLD], axis=1)[:, None]
    expected = special.log_softmax(cos, axis=1)[:, OLD:] + odds + new_classes.offset
    np.testing.assert_allclose(scores[:, OLD:], expected, rtol=1e-8)
    p = new_classes.probabilities(old, asked.logits_nC, asked.x_nD)
    np.testing.assert_allclose(p, special.softmax(scores, axis=1), rtol=1e-9)


@pytest.mark.parametrize("old_loss", [0.0, 1.0, 2.5, 20.0])
@pytest.mark.parametrize("each", [1, 5, 120])
def test_offset_is_the_largest_that_costs_no_more(world, each, old_loss):
    _, old, calibration, labels = world
    new_classes = fitted(world, entries(each), old_loss=old_loss)
    before = (calibration.logits_nC.argmax(1) == labels).mean()

    def loss(by):
        scores = new_classes.scores(old, calibration.logits_nC, calibration.x_nD)
        scores[:, OLD:] += by
        return 100 * (before - (scores.argmax(1) == labels).mean())

    assert loss(-1e-9) <= old_loss + 1e-9
    assert loss(1e-6) > old_loss  # with a little more, one image too many is lost


def test_offset_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(5, 40))
        margin, right = rng.standard_normal(count), rng.random(count) < 0.7
        points = float(rng.integers(0, 30))
        best = max(
            (t for t in margin if 100 * (right & (margin < t)).sum() / count <= points),
            default=-np.inf,
        )
        found = _offset(margin, right, points, int(right.sum()))
        assert 100 * (right & (margin < found)).sum() / count <= points
        assert found >= min(best, margin[right].max(initial=best))


def test_what_new_images_change_as_neighbors_is_part_of_the_loss(world):
    memory, old, calibration, labels = world
    alone = calibration.logits_nC
    right = np.flatnonzero(alone.argmax(1) == labels)
    turned = alone.copy()
    turned[right[:10]] = np.roll(alone[right[:10]], 1, axis=1)  # now wrong
    found = NewClasses.fit(
        old, entries(5), Images(turned, calibration.x_nD), labels, alone_nC=alone, replay=memory
    )
    assert found.old_before == pytest.approx(100 * len(right) / len(labels))
    now = int((turned.argmax(1) == labels).sum())
    assert now < len(right)
    for trade in found.trades:
        least = found.old_before - trade.old_loss
        assert trade.old >= min(least, 100 * now / len(labels)) - 1e-9
    assert found.trades[-1].old < found.old_before - found.trades[-1].old_loss + 0.2


@pytest.mark.parametrize("each", [1, 5, 20, 120])
def test_old_are_kept_and_new_are_found(world, each):
    new_classes = fitted(world, entries(each))
    assert new_classes.learned == (each >= 100)
    before = fitted(world, {}).old_before / 100
    old, new = accuracies(world, new_classes)
    assert old > before - 0.03
    assert new > {1: 0.3, 5: 0.5, 20: 0.6, 120: 0.65}[each]


@pytest.mark.parametrize("each", [5, 120])
def test_trades_predict(world, each):
    """Each image is answered without itself: compared with refitting without it, and with fresh images."""
    _, old, calibration, labels = world
    of = entries(each)
    new_classes = fitted(world, of)
    losses = [t.old_loss for t in new_classes.trades]
    assert losses == sorted(losses)
    assert 1.0 in losses
    for name in ("old", "new"):
        values = [getattr(t, name) for t in new_classes.trades]
        assert values == sorted(values, reverse=name == "old")
    chosen = next(t for t in new_classes.trades if t.old_loss == 1.0)
    assert chosen.offset == new_classes.offset
    old_true, new_true = accuracies(world, new_classes)
    assert chosen.old == pytest.approx(100 * old_true, abs=3)
    assert chosen.new == pytest.approx(100 * new_true, abs=8 if each > 20 else 25)
    assert new_classes.judged_on == pytest.approx(each * len(of))  # classes of one size count alike
    if each < 100:
        right = []
        for k, (name, images) in enumerate(of.items()):
            for i in range(each):
                rest = of | {name: images[np.arange(each) != i]}
                without = NewClasses.fit(old, rest, calibration, labels)
                one = images[np.array([i])]
                scores = without.scores(old, one.logits_nC, one.x_nD)
                scores[:, OLD:] += chosen.offset - without.offset
                right.append(scores.argmax(1)[0] == OLD + k)
        assert chosen.new == pytest.approx(100 * np.mean(right))


def test_one_image_a_class_predicts_nothing_of_the_new(world):
    assert {t.new for t in fitted(world, entries(1)).trades} == {None}


def test_order_of_edits_does_not_matter(world):
    """One after another, at once, in another order, added and removed again: bit-identical results."""
    _, old, calibration, _ = world
    of = entries(6)
    at_once = fitted(world, of)
    asked = calibration.logits_nC, calibration.x_nD
    scores = at_once.scores(old, *asked)
    one_by_one: dict[str, Images] = {}
    for name, images in of.items():
        one_by_one[name] = images
        last = fitted(world, one_by_one)
    assert last.scores(old, *asked).tobytes() == scores.tobytes()
    turned = fitted(world, dict(reversed(of.items()))).scores(old, *asked)
    assert turned[:, OLD:][:, ::-1].tobytes() == scores[:, OLD:].tobytes()
    del one_by_one["new 3"]
    three = fitted(world, {name: of[name] for name in list(of)[:3]}).scores(old, *asked)
    assert fitted(world, one_by_one).scores(old, *asked).tobytes() == three.tobytes()


def test_without_new_classes_the_head(world):
    _, old, calibration, labels = world
    nothing = fitted(world, {})
    scores = nothing.scores(old, calibration.logits_nC, calibration.x_nD)
    assert scores.tobytes() == log_softmax(calibration.logits_nC, old.temperature).tobytes()
    assert nothing.trades == ()
    assert nothing.old_before == 100 * (calibration.logits_nC.argmax(1) == labels).mean()


@pytest.mark.parametrize("each", [3, 120])
def test_rows_do_not_depend_on_company(world, each):
    _, old, calibration, _ = world
    new_classes = fitted(world, entries(each))
    asked = calibration[np.arange(40)]
    whole = new_classes.scores(old, asked.logits_nC, asked.x_nD)
    alone = [
        new_classes.scores(old, asked.logits_nC[i : i + 1], asked.x_nD[i : i + 1])
        for i in range(40)
    ]
    assert whole.tobytes() == np.concatenate(alone).tobytes()


def test_columns_are_scikit_learns():
    """With one old and one new class, the columns are a logistic regression with the same penalty."""
    rng = np.random.default_rng(4)
    inputs = np.concatenate([rng.standard_normal((400, 3)), np.ones((400, 1))], 1)
    target = (rng.random(400) < special.expit(inputs[:, 0] * 2 - 1)).astype(np.int64)
    found = learned_columns(np.zeros((400, 1)), inputs, target, old=1)
    # PENALTY/2·u² plus a mean loss (weights sum to 1) is PENALTY times (u²/2 plus that loss divided by PENALTY).
    model = LogisticRegression(C=1 / PENALTY, tol=1e-10, max_iter=1000)
    weight = 0.5 / np.bincount(target)[target]
    model.fit(inputs[:, :3], target, sample_weight=weight)
    np.testing.assert_allclose(found[0, :3], model.coef_[0], rtol=1e-3, atol=1e-3)
    assert found[0, 3] == pytest.approx(model.intercept_[0], rel=1e-3, abs=1e-3)


def test_columns_repeat(world):
    first, second = (fitted(world, entries(120)) for _ in range(2))
    assert first.column_KE.tobytes() == second.column_KE.tobytes()
    assert first.offset == second.offset


@pytest.mark.parametrize("each", [0, 2, 120])
def test_kept_as_json(world, each):
    _, old, calibration, _ = world
    new_classes = fitted(world, entries(each) if each else {})
    kept = json.dumps([old.to_json(), new_classes.to_json()])
    old_again, again = json.loads(kept)
    old_again, again = OldClasses.from_json(old_again), NewClasses.from_json(again)
    assert again.trades == new_classes.trades
    assert again.names == new_classes.names
    asked = calibration.logits_nC, calibration.x_nD
    assert again.scores(old_again, *asked).tobytes() == new_classes.scores(old, *asked).tobytes()


def test_old_class_without_rows_is_possible(world):
    """All of its images were removed: its mean is only known to be drawn like those of the other old classes."""
    memory, _, calibration, labels = world
    rows = np.repeat(np.arange(OLD), 150)
    old = OldClasses.fit(memory.x_nD, np.where(rows == 2, -1, rows), calibration, labels)
    found = NewClasses.fit(old, entries(5), calibration, labels)
    assert np.isfinite(found.scores(old, calibration.logits_nC, calibration.x_nD)).all()


def test_bad_input(world):
    memory, old, calibration, labels = world
    with pytest.raises(UserError, match="no images"):
        fitted(world, {"empty": calibration[np.arange(0)]})
    blank = Images(np.zeros((1, OLD), np.float32), np.zeros((1, DIM), np.float32))
    with pytest.raises(UserError, match="no features"):
        fitted(world, {"blank": blank})
    for points in (-1.0, 100.0, float("nan")):
        with pytest.raises(UserError, match="may lose"):
            fitted(world, entries(2), old_loss=points)
    with pytest.raises(UserError, match="old classes"):
        OldClasses.fit(memory.x_nD, np.zeros(len(memory), int), calibration, labels)
    with pytest.raises(UserError, match="no calibration"):
        OldClasses.fit(memory.x_nD, np.zeros(len(memory), int), calibration[:0], labels[:0])
    assert old.sharpness > 0


def test_a_rare_old_class_that_is_lost_is_found():
    """One point of all images may be all of a class that has a 200th of them."""
    rng, share = np.random.default_rng(0), 0.6 ** np.arange(10)
    share /= share.sum()
    means = rng.normal(size=(10, 16))

    def images(labels, centers=means):
        x = centers[labels] + rng.normal(size=(len(labels), 16))
        return Images(-0.5 * np.square(x[:, None] - means).sum(2) + np.log(share), x)

    memory, labels = images(rows := rng.choice(10, 1000, p=share)), rng.choice(10, 2000, p=share)
    calibration = images(labels)
    old = OldClasses.fit(memory.x_nD, rows, calibration, labels)
    alike = means[[9]] + 0.3 * rng.normal(size=16)
    for loss in (0.0, 1.0):
        new = NewClasses.fit(
            old, {"n": images(np.zeros(20, int), alike)}, calibration, labels, old_loss=loss
        )
        scores = new.scores(old, calibration.logits_nC, calibration.x_nD)
        wanted = []
        for c in range(10):
            before = (labels == c) & (scores[:, :10].argmax(1) == c)
            turned = int((before & (scores.argmax(1) == 10)).sum())
            if turned > 1 and turned >= before.sum() / 2:
                wanted.append((c, turned, int(before.sum())))
        assert new.lost(old, calibration, labels) == wanted
        assert bool(wanted) == (loss > 0)
