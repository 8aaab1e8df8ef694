"""Calibrated confidence: temperature, scores of unusual images, sets with a stated coverage.

Everything is fitted on calibration images: not used in training, but like those that will be asked about.

- **Temperature** (Guo, Pleiss, Sun, Weinberger, ICML 2017): T minimizes the mean of −log softmax(l/T)_y.
- **Unusual images**: 1 − the largest probability; the quantile, among calibration images, of the distance to the
  k-th neighbor; the weight of the neighbors' vote that is not on the predicted class. All in 0..1, large =
  unusual. They find different images: softmax those between known classes, the distance those that
  look like nothing known.
- **Conformal sets** (split conformal; Vovk et al., 2005; the score is LAC of Sadinle, Lei, Wasserman,
  JASA 2019): with s = 1 − p_y of the n calibration images and q the ⌈(n+1)·coverage⌉-th smallest, the set
  {c: 1 − p_c ≤ q} contains the true class of an exchangeable image with at least the coverage (and at
  most 1/(n+1) above it without ties). LAC rather than APS (Romano et al., 2020), because its sets are the
  smallest on average, it needs no random number per image, and its sets tell why to abstain:
  one with several classes says "one of these", an empty one "none of them".
  The coverage holds on average over images, not for each class.

Shapes: n calibration images, B images asked about, C classes. Pure: arrays in, arrays out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from cnn2gnn_dist.errors import UserError

COLDEST, HOTTEST = 0.02, 50.0
"""Bounds of T: if no calibration image is misclassified, the minimum is at T → 0."""
_ROUNDS = 60


def log_softmax(logits_BC: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Logarithms of ``softmax``, float64 [B, C]."""
    scaled_BC = np.asarray(logits_BC, np.float64) / temperature
    scaled_BC = scaled_BC - scaled_BC.max(1, keepdims=True)
    return scaled_BC - np.log(np.exp(scaled_BC).sum(1, keepdims=True))


def softmax(logits_BC: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return exp(l_c/T) / Σ_c exp(l_c/T) of each row, float64 [B, C]."""
    return np.exp(log_softmax(logits_BC, temperature))


def fit_temperature(logits_nC: np.ndarray, labels_n: np.ndarray) -> float:
    """T that minimizes the negative log-likelihood, within COLDEST..HOTTEST.

    The loss is convex in 1/T with the derivative mean(Σ_c p_c l_c − l_y), so bisection finds the minimum.

    Args:
        logits_nC: of calibration images.
        labels_n: classes 0..C−1.

    Raises:
        UserError: no calibration images.
    """
    _need_images(len(labels_n))
    logits_nC = np.asarray(logits_nC, np.float64)
    of_label_n = logits_nC[np.arange(len(labels_n)), labels_n]
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(_ROUNDS):
        middle = math.sqrt(low * high)
        expected_n = (softmax(logits_nC, 1 / middle) * logits_nC).sum(1)
        if (expected_n - of_label_n).mean() > 0:
            high = middle
        else:
            low = middle
    return 1 / math.sqrt(low * high)


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| over equal-width bins, weighted.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    count = np.bincount(bin_N, minlength=bins)
    gap = np.bincount(bin_N, right_N.astype(float), bins) - np.bincount(bin_N, confidence_N, bins)
    return float(np.abs(gap).sum() / max(count.sum(), 1))


@dataclass(frozen=True, eq=False)
class ConformalSets:
    """Sets of classes that contain the true one with a stated coverage.

    Attributes:
        scores_n: 1 − p_y of the calibration images, ascending.
    """

    scores_n: np.ndarray

    @classmethod
    def fit(cls, p_nC: np.ndarray, labels_n: np.ndarray) -> ConformalSets:
        """Fit to probabilities of calibration images.

        Raises:
            UserError: no calibration images.
        """
        _need_images(len(labels_n))
        return cls(np.sort(1.0 - np.asarray(p_nC, np.float64)[np.arange(len(labels_n)), labels_n]))

    def threshold(self, coverage: float) -> float:
        """q: the ⌈(n+1)·coverage⌉-th smallest score.

        Raises:
            UserError: a coverage outside 0..1, or one that n images can't support.
        """
        if not 0 < coverage < 1:
            raise UserError(
                f"coverage {coverage}", where="coverage", remedy="between 0 and 1, such as 0.95"
            )
        exact = Fraction(repr(float(coverage)))  # 0.95 in decimal, or 100 · 0.95 may exceed 95
        count = len(self.scores_n)
        rank = math.ceil((count + 1) * exact)
        if rank > count:
            needed = math.ceil(exact / (1 - exact))
            possible = Fraction(count, count + 1)
            raise UserError(
                f"coverage {coverage} needs at least {needed} calibration images, and there are {count}",
                where="coverage",
                remedy=f"a coverage of at most {math.floor(possible * 10_000) / 10_000}, or train with"
                " a larger data.calibration",
            )
        return float(self.scores_n[rank - 1])

    def sets(self, p_BC: np.ndarray, coverage: float) -> np.ndarray:
        """Bool [B, C]: the classes in each image's set.

        Raises:
            UserError: see ``threshold``.
        """
        return 1.0 - np.asarray(p_BC, np.float64) <= self.threshold(coverage)

    def to_json(self) -> dict[str, Any]:
        """As JSON-compatible data."""
        return {"scores": self.scores_n.tolist()}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> ConformalSets:
        """The inverse of ``to_json``, bit for bit."""
        return cls(np.array(kept["scores"], np.float64))


@dataclass(frozen=True, eq=False)
class Unusual:
    """Scores of how unlike the known images an image is: float64 [B] each, 0..1, large = unusual.

    Attributes:
        softmax_B: 1 − the largest probability.
        distance_B: fraction of the calibration images whose k-th neighbor is at most as far.
            None for a model without a memory.
        vote_B: weight of the neighbors' vote that is not on the predicted class; None likewise.
    """

    softmax_B: np.ndarray
    distance_B: np.ndarray | None
    vote_B: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Calibration:
    """What calibration images tell about a model.

    Attributes:
        temperature: T.
        sets: conformal sets of softmax(l/T).
        distances_n: squared distances of the calibration images to their k-th neighbor, ascending;
            empty for a model without a memory.
    """

    temperature: float
    sets: ConformalSets
    distances_n: np.ndarray

    @classmethod
    def fit(
        cls, logits_nC: np.ndarray, labels_n: np.ndarray, distances_n: np.ndarray | None = None
    ) -> Calibration:
        """Fit everything to calibration images.

        T is fitted on the same images as the sets. With one parameter and thousands of images the
        effect on the coverage is not measurable (tests check this).

        Args:
            logits_nC: with the graph, as in use.
            labels_n: classes 0..C−1.
            distances_n: squared distances to the k-th neighbor in the memory, the image itself excluded.

        Raises:
            UserError: no calibration images.
        """
        temperature = fit_temperature(logits_nC, labels_n)
        sets = ConformalSets.fit(softmax(logits_nC, temperature), labels_n)
        distances = np.array([] if distances_n is None else distances_n, np.float64)
        return cls(temperature, sets, np.sort(distances))

    def probabilities(self, logits_BC: np.ndarray) -> np.ndarray:
        """softmax(l / T), float64 [B, C]."""
        return softmax(logits_BC, self.temperature)

    def unusual(
        self,
        p_BC: np.ndarray,
        distances_B: np.ndarray | None = None,
        vote_BC: np.ndarray | None = None,
    ) -> Unusual:
        """Score how unlike the known images are.

        Args:
            p_BC: probabilities of the answers, of all classes that can be one.
            distances_B: squared distances to the k-th neighbor, k as in ``fit``.
            vote_BC: weights of the neighbors, summed by the same classes; rows sum to at most 1.
        """
        distance_B = vote_B = None
        if distances_B is not None and len(self.distances_n):
            below_B = np.searchsorted(self.distances_n, np.asarray(distances_B), side="right")
            distance_B = below_B / (len(self.distances_n) + 1)
        if vote_BC is not None:
            predicted_B = p_BC.argmax(1)
            on_it_B = np.asarray(vote_BC, np.float64)[np.arange(len(p_BC)), predicted_B]
            vote_B = np.maximum(1.0 - on_it_B, 0.0)  # float32 weights may sum to 1 and a rounding
        return Unusual(1.0 - p_BC.max(1), distance_B, vote_B)

    def to_json(self) -> dict[str, Any]:
        """As JSON-compatible data."""
        return {
            "temperature": self.temperature,
            "sets": self.sets.to_json(),
            "distances": self.distances_n.tolist(),
        }

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Calibration:
        """The inverse of ``to_json``, bit for bit."""
        return cls(
            float(kept["temperature"]),
            ConformalSets.from_json(kept["sets"]),
            np.array(kept["distances"], np.float64),
        )


def _need_images(count: int) -> None:
    if count == 0:
        raise UserError(
            "there are no calibration images",
            where="data.calibration",
            remedy="train with data.calibration=0.05 or more",
        )
