"""What is answered for a set of images, and the answer for a set that is known to be of one class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cnn2gnn_dist.inference.calibration import softmax


@dataclass(frozen=True)
class Relations:
    """What is answered for a set of images.

    Attributes:
        posterior_mC: float64, rows sum to 1.
        related: the set's images were found to be related (or declared to be, by ``same``), so that the
            posterior depends on the other images.
        classes: number of different classes that the set was found to show (of the answers).
        score: of being related; ``threshold``: what it had to exceed.
    """

    posterior_mC: np.ndarray
    related: bool
    classes: int
    score: float
    threshold: float


def same_class(logits_mC: np.ndarray, temperature: float) -> Relations:
    """Answer a set that is known to be of one class: softmax(mean logits / T), for each image."""
    mean_1C = np.asarray(logits_mC, np.float64).mean(0, keepdims=True)
    p_mC = np.repeat(softmax(mean_1C, temperature), len(logits_mC), axis=0)
    return Relations(p_mC, len(p_mC) > 1, min(len(p_mC), 1), 1.0, 0.0)
