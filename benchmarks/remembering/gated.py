"""Rival ways to answer a small burst, behind the learned gate: what is left of their gain if strangers lose as little.

Each way gets a threshold of its own on the learned score, by the product's rule: the lowest beyond which random sets of
calibration images, answered by that way, lose 0.12 points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cnn2gnn_dist.inference.sets.learned import LearnedSets, affordable
from remembering.sets import Answer, difference, drawn_sets

SIZES = (2, 3, 4)


class Images(NamedTuple):
    """Logits [n, C], features [n, d] and labels [n]."""

    logits: np.ndarray
    z: np.ndarray
    labels: np.ndarray


def judged(
    learned: LearnedSets, answer: Answer, of: Images, size: int, classes: int, sets: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Learned score, and share of right answers by the way and alone, of so many sets: each [S].

    Args:
        learned: gives the score.
        answer: the way.
        of: the images.
        size: of each set.
        classes: 1: of a burst; 0: strangers.
        sets: S.
    """
    found = []
    for at in drawn_sets(of.labels, size, classes, sets):
        logits, z, labels = of.logits[at], of.z[at], of.labels[at]
        right, alone = (answer(logits, z) == labels).mean(), (logits.argmax(1) == labels).mean()
        found.append((learned(logits, z).score, right, alone))
    score_S, right_S, alone_S = np.array(found, np.float64).T
    return score_S, right_S, alone_S


def rows(
    learned: LearnedSets,
    ways: dict[str, Answer],
    calibration: Images,
    test: Images,
    sets: int,
    strangers: int,
) -> Iterator[str]:
    """Lines of a table: for each size and way, points gained on bursts and on strangers.

    Args:
        learned: the gate.
        ways: name and answer.
        calibration: images for the thresholds.
        test: images that are answered.
        sets: bursts of each size.
        strangers: sets of strangers of each size, of calibration and of test images.
    """
    yield "| images | way | fires on bursts | gains on bursts | fires on strangers | gains on strangers |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for size in SIZES:
        for name, answer in ways.items():
            score_S, right_S, alone_S = judged(learned, answer, calibration, size, 0, strangers)
            threshold = affordable(score_S, alone_S - right_S)
            cells = [str(size), name]
            for classes, count in ((1, sets), (0, strangers)):
                score_S, right_S, alone_S = judged(learned, answer, test, size, classes, count)
                fires_S = score_S > threshold
                gain = difference(np.where(fires_S, right_S, alone_S), alone_S)
                cells += [f"{fires_S.mean():.2f}", "{:.2f} ± {:.2f}".format(*gain)]
            yield f"| {' | '.join(cells)} |"
