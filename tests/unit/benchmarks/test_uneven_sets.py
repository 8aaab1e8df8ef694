"""Sets drawn for the benchmark of uneven classes, and its table."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.benchmarks import benchmark

uneven_sets = benchmark("uneven_sets")

LABELS = np.repeat(np.arange(10), 20)


@pytest.mark.parametrize("classes", [0, 1, 2, 3])
def test_no_image_is_twice_in_a_set(classes: int) -> None:
    seen = set()
    for seed in range(60):
        rows = uneven_sets.drawn(LABELS, classes, np.random.default_rng(seed))
        assert len(set(rows.tolist())) == uneven_sets.SIZE
        found = set(LABELS[rows].tolist())
        assert len(found) == classes or not classes
        seen |= found
    assert seen == set(range(10))


def test_classes_of_a_set_are_equally_likely_to_be_drawn() -> None:
    """Of 16 images of two classes each has 8 on average, deviation 2: a mean of 400 sets is within 0.4."""
    rng, first = np.random.default_rng(0), []
    for _ in range(400):
        labels = LABELS[uneven_sets.drawn(LABELS, 2, rng)]
        first.append((labels == labels.min()).sum())
    assert np.mean(first) == pytest.approx(8, abs=0.4)
    assert np.std(first) == pytest.approx(2, abs=0.3)


def of_model(shift: float) -> dict[str, list[np.ndarray]]:
    """Two sets of each kind; the columns of a row are 10 points apart."""
    row = np.arange(5) / 10
    return {kind: [row + shift, row + shift + 0.02] for kind in uneven_sets.KINDS}


def test_the_table_has_the_spread_of_the_models_not_of_the_sets() -> None:
    """By hand: the models' means are 11 and 15 percent in the first column, 3 ± 2.8 (n - 1) around 13."""
    lines = uneven_sets.table([of_model(0.10), of_model(0.14)]).splitlines()[2:]
    shown = [f"{13 + 10 * column}.0 ± 2.8" for column in range(5)]
    assert lines[0] == f"| 1 class | {' | '.join(shown)} |"
    assert lines[1] == f"| 2 classes | {' | '.join(shown[:3])} |  |  |"
    assert uneven_sets.table([of_model(0.10)]).splitlines()[2].startswith("| 1 class | 11.0 | 21.0")
