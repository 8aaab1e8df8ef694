"""What is answered for a set of images, and the answer for a set that is known to be of one class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def company(found: Relations, alone_mC: np.ndarray | None) -> dict[str, Any]:
    """What each answer says of the set.

    Args:
        found: for the set.
        alone_mC: where one class was declared (``same``), the probabilities of the images alone.

    Returns:
        ``related``, ``classes`` and ``images`` of the set. Where one class was declared also ``same``; ``elsewhere``,
        the number of images that alone are of another class, and ``elsewhere_probability``, how sure these are on
        average; and ``contradicted``: these are more than twice as many, beyond chance, as are wrong by the
        probabilities of all images alone.
    """
    said: dict[str, Any] = {
        "related": found.related,
        "classes": found.classes,
        "images": len(found.posterior_mC),
    }
    if alone_mC is None:
        return said
    sure_m = alone_mC.max(1)
    other_m = alone_mC.argmax(1) != found.posterior_mC[0].argmax()
    wrong = float((1 - sure_m).sum())
    said |= {"same": True, "elsewhere": int(other_m.sum())}
    if other_m.any():
        said["elsewhere_probability"] = round(float(sure_m[other_m].mean()), 4)
    return said | {"contradicted": bool(other_m.sum() > 2 * (wrong + wrong**0.5))}
