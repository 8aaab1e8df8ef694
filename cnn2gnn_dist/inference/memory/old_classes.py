"""The distribution of the old classes' features, by which new classes are told from them (``new_classes.py``).

Features f are the stem's x, centered and of unit length. Their model is the two-covariance model
(probabilistic LDA without subspaces; Ioffe, ECCV 2006; Brümmer, de Villiers, Odyssey 2010): a class mean is
drawn from N(m, B), an image from N(mean, W). B and W are estimated from the old classes in the memory,
so that a new class can consist of one image: with n images of mean y, in coordinates where W = 1 and
B = diag(b), its f is distributed as

    N(n b/(1 + n b)·y, 1 + b/(1 + n b)).

Few old classes tell nothing about most directions, so b is averaged with its mean over directions. κ is fitted on
calibration images of the old classes, by their likelihood.

Shapes: N rows of the memory, n calibration images, B images, C old classes, K any classes, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import fit_temperature

DIRECTION = 10.0
"""Scale of cosines."""
_RIDGE = 1e-2  # of W, relative to its mean variance
_UNKNOWN = 0.5  # share of the mean over directions in b
_SMALL = 1e-6


@dataclass(frozen=True, eq=False)
class Images:
    """Images as input of rule R.

    Attributes:
        logits_nC: the head's, over the old classes.
        x_nD: the stem's features.
    """

    logits_nC: np.ndarray
    x_nD: np.ndarray

    def __len__(self) -> int:
        return len(self.x_nD)

    def __getitem__(self, rows: np.ndarray) -> Images:
        return Images(self.logits_nC[rows], self.x_nD[rows])


@dataclass(frozen=True, eq=False)
class Features:
    """f [B, D] of unit length, and y [B, D], the same in the coordinates of the model."""

    f_BD: np.ndarray
    y_BD: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Features:
        return Features(self.f_BD[rows], self.y_BD[rows])


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Scores K classes by the mean and number of their images: constants of the formulas above."""

    direction_KD: np.ndarray
    linear_KD: np.ndarray
    precision_KD: np.ndarray
    constant_K: np.ndarray

    def of_each(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """10·cos(f, mean) and log p(f | class) up to a constant, of each image in each class [B, K]."""
        cos_BK = DIRECTION * dot(features.f_BD, self.direction_KD)
        squares_BK = dot(np.square(features.y_BD), self.precision_KD)
        return cos_BK, dot(features.y_BD, self.linear_KD) - 0.5 * (squares_BK + self.constant_K)

    def of_own(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """The same of image i in class i: two [B], B = K."""
        cos_B = DIRECTION * (features.f_BD * self.direction_KD).sum(1)
        squares_B = (np.square(features.y_BD) * self.precision_KD).sum(1)
        linear_B = (features.y_BD * self.linear_KD).sum(1)
        return cos_B, linear_B - 0.5 * (squares_B + self.constant_K)


@dataclass(frozen=True, eq=False)
class OldClasses:
    """The old classes: the head's temperature, and the distribution of their features.

    Attributes:
        temperature: T of the head.
        sharpness: κ.
        zero_D: mean of x over the rows; f = (x − zero) / ‖x − zero‖.
        spread_D: standard deviation of x over the rows.
        energy_2: mean and standard deviation of log Σ exp(l/T) over calibration images.
        mean_CD: class means of f, not of unit length.
        count_C: rows of each class.
        centre_D: m.
        axes_DD: rows are the directions in which W = 1 and B is diagonal: y = axes (f − m).
        between_D: b.
    """

    temperature: float
    sharpness: float
    zero_D: np.ndarray
    spread_D: np.ndarray
    energy_2: np.ndarray
    mean_CD: np.ndarray
    count_C: np.ndarray
    centre_D: np.ndarray
    axes_DD: np.ndarray
    between_D: np.ndarray

    @classmethod
    def fit(
        cls,
        x_ND: np.ndarray,
        labels_N: np.ndarray,
        calibration: Images,
        labels_n: np.ndarray,
        *,
        temperature: float | None = None,
    ) -> OldClasses:
        """Fit to the memory's rows of the old classes, and κ to calibration images.

        Args:
            x_ND: of the memory.
            labels_N: old classes, 0..C−1; others (of new classes, or -1) are left out.
            calibration: held-out images of the old classes.
            labels_n: their classes.
            temperature: T, if it is already fitted.

        Raises:
            UserError: no calibration images, or rows of fewer than two old classes.
        """
        temperature = temperature or fit_temperature(calibration.logits_nC, labels_n)
        classes = calibration.logits_nC.shape[1]
        old_N = (labels_N >= 0) & (labels_N < classes)
        x_ND, labels_N = np.asarray(x_ND, np.float64)[old_N], np.asarray(labels_N)[old_N]
        count_C = np.bincount(labels_N, minlength=classes)
        present = int((count_C > 0).sum())
        if present < 2 or len(x_ND) <= present:
            raise UserError(
                f"the memory has {len(x_ND)} images of {present} old classes",
                where="memory",
                remedy="keep at least two old classes with two or more images each: they show how classes differ",
            )
        zero_D, spread_D = x_ND.mean(0), x_ND.std(0) + _SMALL
        energy_n1 = log_sum(np.asarray(calibration.logits_nC, np.float64) / temperature)
        energy_2 = np.array([energy_n1.mean(), energy_n1.std() + _SMALL])
        f_ND = unit(x_ND - zero_D)
        mean_CD = np.zeros((classes, f_ND.shape[1]))
        np.add.at(mean_CD, labels_N, f_ND)
        mean_CD /= np.maximum(count_C, 1)[:, None]
        shape = _two_covariances(f_ND, labels_N, mean_CD, count_C > 0)
        flat = cls(temperature, 1.0, zero_D, spread_D, energy_2, mean_CD, count_C, *shape)
        _, density_nC = flat.known.of_each(flat.features(calibration.x_nD))
        return replace(flat, sharpness=1 / fit_temperature(density_nC, labels_n))

    def features(self, x_BD: np.ndarray) -> Features:
        """F and y of the stem's x."""
        f_BD = unit(np.asarray(x_BD, np.float64) - self.zero_D)
        return Features(f_BD, dot(f_BD - self.centre_D, self.axes_DD))

    def scorer(self, mean_KD: np.ndarray, count_K: np.ndarray) -> ClassScores:
        """Constants of classes with these means of f, over these numbers of images."""
        y_KD = dot(mean_KD - self.centre_D, self.axes_DD)
        n_K1 = np.asarray(count_K, np.float64)[:, None]
        spread_KD = self.between_D / (1 + n_K1 * self.between_D)
        centre_KD = n_K1 * spread_KD * y_KD
        precision_KD = 1 / (1 + spread_KD)
        constant_K = (np.square(centre_KD) * precision_KD - np.log(precision_KD)).sum(1)
        return ClassScores(unit(mean_KD), centre_KD * precision_KD, precision_KD, constant_K)

    @cached_property
    def known(self) -> ClassScores:
        """Constants of the old classes."""
        return self.scorer(self.mean_CD, self.count_C)

    def to_json(self) -> dict[str, Any]:
        """As JSON-compatible data."""
        return to_json(self)

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> OldClasses:
        """The inverse of ``to_json``, bit for bit."""
        arrays: dict[str, Any] = {
            n: np.array(v) if isinstance(v, list) else v for n, v in kept.items()
        }
        return cls(**arrays)


def _two_covariances(
    f_ND: np.ndarray, labels_N: np.ndarray, mean_CD: np.ndarray, present_C: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return m, axes and b."""
    dim, classes = f_ND.shape[1], int(present_C.sum())
    inside_ND = f_ND - mean_CD[labels_N]
    within_DD = inside_ND.T @ inside_ND / (len(f_ND) - classes)
    within_DD += _RIDGE * max(np.trace(within_DD) / dim, _SMALL**2) * np.eye(dim)
    centre_D = mean_CD[present_C].mean(0)
    apart_CD = mean_CD[present_C] - centre_D
    between_DD = apart_CD.T @ apart_CD / (classes - 1)
    whiten_DD = np.linalg.inv(np.linalg.cholesky(within_DD))
    between_D, turn_DD = np.linalg.eigh(whiten_DD @ between_DD @ whiten_DD.T)
    between_D = between_D.clip(min=0)
    between_D = (1 - _UNKNOWN) * between_D + _UNKNOWN * between_D.mean()
    return centre_D, np.ascontiguousarray(turn_DD.T @ whiten_DD), between_D


def unit(rows_BD: np.ndarray) -> np.ndarray:
    """Rows of unit length; 0 stays 0."""
    return rows_BD / np.maximum(np.sqrt(np.square(rows_BD).sum(1, keepdims=True)), 1e-12)


def dot(a_BD: np.ndarray, b_KD: np.ndarray) -> np.ndarray:
    """A bᵀ, [B, K], each row bit-identical regardless of the others (which a BLAS product does not guarantee)."""
    return np.einsum("bd,kd->bk", a_BD, b_KD, optimize=False)


def log_sum(scores_BC: np.ndarray) -> np.ndarray:
    """Log Σ exp of each row, [B, 1]."""
    top_B1 = scores_BC.max(1, keepdims=True)
    return top_B1 + np.log(np.exp(scores_BC - top_B1).sum(1, keepdims=True))


def to_json(of: Any) -> dict[str, Any]:
    """A dataclass of numbers and arrays as JSON-compatible data."""
    kept = {field.name: getattr(of, field.name) for field in fields(of)}
    return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in kept.items()}
