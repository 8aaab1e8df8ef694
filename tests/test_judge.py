"""Scores against definitions written out, scikit-learn, and loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from cnn2gnn_dist.stages.evaluate import table
from cnn2gnn_dist.stages.judge import Predictions, calibration_error
from cnn2gnn_dist.stages.neighbourhood import last_refresh, parts_of


@pytest.fixture
def found():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [50, 30, 15, 5])
    predicted = np.where(rng.random(100) < 0.7, labels, rng.integers(0, 5, 100))
    return Predictions(np.arange(100), predicted, rng.random(100).astype(np.float32), labels)


def test_scores_equal_scikit_learns(found):
    scores = found.scores(5)
    assert scores["accuracy"] == pytest.approx((found.predicted_N == found.label_N).mean())
    with pytest.warns(UserWarning, match="classes not in y_true"):
        wanted = balanced_accuracy_score(found.label_N, found.predicted_N)
    assert scores["balanced_accuracy"] == pytest.approx(wanted)


def test_calibration_error_by_hand(found):
    right = found.predicted_N == found.label_N
    total = 0.0
    for b in range(15):
        low, high = b / 15, (b + 1) / 15
        inside = (found.confidence_N >= low) & (found.confidence_N < high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - found.confidence_N[inside].mean())
    assert calibration_error(found.confidence_N, right) == pytest.approx(total, rel=1e-5)
    assert calibration_error(np.ones(10), np.ones(10, bool)) == 0.0
    assert calibration_error(np.ones(10), np.zeros(10, bool)) == 1.0


def test_last_refresh_over_epochs():
    from cnn2gnn_dist.config import GraphConfig

    every_third = GraphConfig(start_epoch=2, refresh_epochs=3)
    found = [last_refresh(epoch, every_third) for epoch in range(10)]
    assert found == [None, None, 2, 2, 2, 5, 5, 5, 8, 8]


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (1, 4), (2, 2), (2, 5), (3, 8), (4, 4)])
def test_every_part_has_one_owner_and_every_rank_a_part(world, parts):
    owned = [parts_of(rank, world, parts) for rank in range(world)]
    assert sorted(p for parts_of_one in owned for p in parts_of_one) == list(range(parts))
    assert all(owned)


def test_table_shows_every_model():
    row = {
        "accuracy": 0.5,
        "balanced_accuracy": 0.4,
        "ece": 0.1,
        "parameters": 12345,
        "flops": 2e6,
        "ms_per_image": 0.25,
    }
    text = table({"teacher": row, "student": row, "control_mlp": row})
    assert text.count("50.00%") == 3
    assert "12,345" in text
