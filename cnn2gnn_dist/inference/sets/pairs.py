"""How much likelier the features of two images are if both show one class than if they show two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.sets.logistic import fit_balanced

_COMPARED = 3000  # calibration images whose pairs are compared


@dataclass(frozen=True)
class PairOdds:
    """log P(z_i, z_j | one class) / P(z_i, z_j | two classes) = slope · cos(z_i, z_j) + offset."""

    slope: float
    offset: float

    def __call__(self, z_md: np.ndarray) -> np.ndarray:
        """Log-odds float64 [..., m, m] of features of unit length [..., m, d]."""
        z_md = np.asarray(z_md, np.float64)
        return self.slope * (z_md @ z_md.swapaxes(-1, -2)) + self.offset

    @classmethod
    def fit(cls, z_nd: np.ndarray, labels_n: np.ndarray, rng: np.random.Generator) -> PairOdds:
        """Logistic regression on pairs of images, both kinds of equal weight in all.

        Args:
            z_nd: features of unit length.
            labels_n: their classes.
            rng: chooses the images, where there are more than are compared.

        Raises:
            UserError: fewer than 4 images, or no two of one class, or one class only.
        """
        _check(labels_n)
        if len(labels_n) > _COMPARED:
            chosen = np.sort(rng.choice(len(labels_n), _COMPARED, replace=False))
            z_nd, labels_n = z_nd[chosen], labels_n[chosen]
        z_nd = z_nd.astype(np.float64)
        first, second = np.triu_indices(len(labels_n), 1)
        cos_P = (z_nd @ z_nd.T)[first, second]
        same_P = labels_n[first] == labels_n[second]
        weights, offset = fit_balanced(cos_P[:, None], same_P)
        return cls(float(weights[0]), offset)


def _check(labels_n: np.ndarray) -> None:
    counts = np.unique(labels_n, return_counts=True)[1]
    if len(labels_n) < 4 or len(counts) < 2 or counts.max() < 2:
        raise UserError(
            f"{len(labels_n)} calibration images of {len(counts)} classes don't show how similar images"
            " of one class are",
            where="data.calibration",
            remedy="train with a larger data.calibration: two images of two classes or more",
        )
