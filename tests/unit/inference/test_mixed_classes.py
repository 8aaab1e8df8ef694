"""New classes of few images beside one of many, whose columns are learned."""

from __future__ import annotations

import numpy as np
import pytest

from cnn2gnn_dist.inference.memory.new_classes import NewClasses
from tests.unit.inference.test_new_classes import (  # noqa: F401 (fixture)
    OLD,
    accuracies,
    drawn,
    fitted,
    world,
)


@pytest.fixture(scope="module")
def mixed(world):
    """Two classes of 150 and 120 images, whose columns are learned, and two of 6 and 2."""
    counts = {"many": 150, "few": 6, "more": 120, "two": 2}
    of = {n: drawn([2, k], np.array([OLD + k]), c)[0] for k, (n, c) in enumerate(counts.items())}
    return of, fitted(world, of)


def test_a_class_of_few_images_leaves_the_columns_of_others(world, mixed):
    """It used to put all classes back on their means."""
    _, old, calibration, _ = world
    of, both = mixed
    assert [both.is_learned(name) for name in both.names] == [True, False, True, False]
    alone = fitted(world, {name: of[name] for name in ("many", "more")})
    asked = calibration.logits_nC, calibration.x_nD
    scores, before = (new.scores(old, *asked)[:, OLD:] - new.offset for new in (both, alone))
    np.testing.assert_allclose(scores[:, [0, 2]], before, rtol=1e-12)
    assert both.column_KE[[0, 2]].tobytes() == alone.column_KE.tobytes()
    means = NewClasses.fit(old, of, calibration, world[3])
    found = means.scores(old, *asked)[:, OLD:] - means.offset
    np.testing.assert_allclose(scores[:, [1, 3]], found[:, [1, 3]], rtol=1e-12)


def test_mixed_classes_lose_no_more_of_the_old_than_is_allowed(world, mixed):
    _, old, calibration, labels = world
    _, new = mixed
    scores = new.scores(old, calibration.logits_nC, calibration.x_nD)
    lost = []
    for by in (-1e-9, 1e-6):
        scores[:, OLD:] += by
        lost.append(new.old_before - 100 * (scores.argmax(1) == labels).mean())
    assert lost[0] <= 1.0 < lost[1]
    assert accuracies(world, new)[0] > new.old_before / 100 - 0.03


def test_mixed_classes_are_predicted_each_by_its_own_scores(world, mixed):
    """Images of few: as after removing one of them; of many: as on fresh images."""
    _, old, _, _ = world
    of, new = mixed
    chosen = next(t for t in new.trades if t.old_loss == 1.0)
    recall = {}
    for k, (name, images) in enumerate(of.items()):
        if new.is_learned(name):
            fresh, _ = drawn([77, k], np.array([OLD + k]), 400)
            scores = new.scores(old, fresh.logits_nC, fresh.x_nD)
            recall[name] = (scores.argmax(1) == OLD + k).mean()
            continue
        right = []
        for i in range(len(images)):
            rest = of | {name: images[np.arange(len(images)) != i]}
            without = fitted(world, rest)
            one = images[np.array([i])]
            scores = without.scores(old, one.logits_nC, one.x_nD)
            scores[:, OLD:] += chosen.offset - without.offset
            right.append(scores.argmax(1)[0] == OLD + k)
        recall[name] = np.mean(right)
    assert chosen.new == pytest.approx(100 * np.mean(list(recall.values())), abs=3)
