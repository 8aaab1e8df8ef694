"""Class shares of training, which a network's logits contain, are not those of a set of images answered together.

A network trained on uneven classes has learned l_c = log p(x | c) + s·log π_c, with s = 1, or about 1 - τ after
``student.logit_adjust`` = τ. That is right for an image by itself. But whoever combines m images counts π m
times: 16 images of a rare class, each of which could just as well be of a frequent one, are then surely
of that one. ``shift_C`` is -s·log π_c; a set of m images has (1 - 1/m) of it added to each image's l/T, so that π
counts once.

Shapes: n calibration images, m images of a set, C classes. Pure.
"""

from __future__ import annotations

import numpy as np

from cnn2gnn_dist.inference.calibration import softmax

EVEN = 2.0
"""Classes count as even up to this ratio of the largest to the smallest: what is estimated would be mostly noise."""
_STEEPEST, _ROUNDS = 1.5, 50


def are_uneven(labels_n: np.ndarray, classes: int) -> bool:
    """Whether the largest class has more than ``EVEN`` times the images of the smallest."""
    count_C = _counts(labels_n, classes)
    return bool(count_C.max() > EVEN * count_C.min())


def shift_of(logits_nC: np.ndarray, labels_n: np.ndarray, temperature: float) -> np.ndarray | None:
    """-s·log π_c, up to a constant: float64 [C]; None for even classes.

    π are the classes' shares of calibration images. s is the one number, within ±1.5, that minimizes
    the class-balanced mean of -log softmax(l/T + shift)_y, which is convex in s: bisection of its derivative.

    Args:
        logits_nC: of calibration images.
        labels_n: their classes.
        temperature: T.
    """
    classes = logits_nC.shape[1]
    if not are_uneven(labels_n, classes):
        return None
    count_C = _counts(labels_n, classes)
    rare_C = -np.log(count_C / count_C.sum())
    rare_C -= rare_C.mean()
    weight_n = 1 / count_C[labels_n]
    scaled_nC = np.asarray(logits_nC, np.float64) / temperature
    low, high = -_STEEPEST, _STEEPEST
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        expected_n = softmax(scaled_nC + middle * rare_C) @ rare_C
        if (weight_n * (expected_n - rare_C[labels_n])).sum() > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2 * rare_C


def _counts(labels_n: np.ndarray, classes: int) -> np.ndarray:
    """Images of each class; one of a class that has none."""
    return np.bincount(labels_n, minlength=classes).clip(min=1)
