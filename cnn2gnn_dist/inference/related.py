"""The gate before sets of images are answered together: do they belong together?

Two measures of a set, each a mean over its pairs i < j, with p the class probabilities of the images alone:

- *agreement*: Σ_c p_ic p_jc, the probability of the same class if there were no features;
- *evidence*: log(1 + C · Σ_c p_ic p_jc · odds_ij), where odds_ij = exp(a·cos(z_i, z_j) + b) is how much likelier
  the two features are in images of one class than of two.

A set's score is w₁·agreement + w₂·evidence, both in standard deviations from their mean over random sets of
that size. The weights are learned by logistic regression: random sets of calibration images against sets
of few classes among them. A set is related if its score exceeds those of 98 of 100 further random sets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cnn2gnn_dist.inference.logistic import fit_balanced

LEVEL = 0.98
SIZES = (2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64)
LARGE = (91, 128, 181, 256, 512, 1024)
"""Sizes from which agreement alone is looked at: it tells nearly always, and evidence costs m² logarithms."""
_STRANGERS = 4000  # random sets of each size: the standard error of the level is 0.2 %
_LEARNED = 1500  # random sets and as many related ones, from which the weights are learned
_CELLS = 4_000_000  # numbers handled at once
_LEAST = 1e-12


@dataclass(frozen=True)
class Gate:
    """The gate, fitted for some sizes of a set; everything is linear in log m in between.

    Attributes:
        sizes: numbers of images m.
        weights: (agreement, evidence), for each size; (1, 0) where only agreement counts.
        means, deviations: of the two measures over random sets, for each size.
        thresholds: of the score, for each size.
    """

    sizes: tuple[int, ...]
    weights: tuple[tuple[float, float], ...]
    means: tuple[tuple[float, float], ...]
    deviations: tuple[tuple[float, float], ...]
    thresholds: tuple[float, ...]

    def score(self, p_mC: np.ndarray, log_odds_mm: np.ndarray) -> float:
        """The score of a set of at least two images.

        Args:
            p_mC: class probabilities of each image alone.
            log_odds_mm: a·cos(z_i, z_j) + b.
        """
        count = len(p_mC)
        weights, means, deviations = (
            np.array([self._at(count, [row[k] for row in rows]) for k in (0, 1)])
            for rows in (self.weights, self.means, self.deviations)
        )
        measures = np.array([agreement(p_mC[None])[0], 0.0])
        if weights[1]:
            measures[1] = evidence(p_mC[None], log_odds_mm[None])[0]
        return float((weights * (measures - means) / deviations).sum())

    def threshold(self, count: int) -> float:
        """What the score of this many images has to exceed; beyond the largest size, that one's."""
        return self._at(count, list(self.thresholds))

    def _at(self, count: int, values: list[float]) -> float:
        return float(np.interp(np.log(count), np.log(self.sizes), values))

    @classmethod
    def fit(
        cls,
        p_nC: np.ndarray,
        z_nd: np.ndarray,
        labels_n: np.ndarray,
        edge: tuple[float, float],
        seed: int,
    ) -> Gate:
        """Fit it on calibration images; the same bits for the same seed.

        Args:
            p_nC: class probabilities.
            z_nd: features of unit length.
            labels_n: classes.
            edge: a and b of the odds.
            seed: of the sets that are drawn.
        """
        z_nd = np.asarray(z_nd, np.float64)
        sizes = [m for m in (*SIZES, *LARGE) if m <= max(2, len(labels_n) // 4)]
        columns = [
            _of_size(m, p_nC, z_nd, np.asarray(labels_n), edge, np.random.default_rng([seed, m]))
            for m in sizes
        ]
        last = max(at for at, size in enumerate(sizes) if size <= SIZES[-1])
        for at in range(last + 1, len(sizes)):  # nothing of evidence's own to interpolate towards
            weight, mean, deviation, threshold = columns[at]
            mean, deviation = (mean[0], columns[last][1][1]), (deviation[0], columns[last][2][1])
            columns[at] = weight, mean, deviation, threshold
        weights, means, deviations, thresholds = zip(*columns, strict=True)
        return cls(tuple(sizes), weights, means, deviations, thresholds)

    @classmethod
    def of_agreement(cls, sizes: list[int], thresholds: list[float]) -> Gate:
        """The gate of models from before it was learned: agreement against a threshold."""
        count = len(sizes)
        return cls(
            tuple(sizes), ((1.0, 0.0),) * count, ((0.0, 0.0),) * count, ((1.0, 1.0),) * count,
            tuple(thresholds),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As what JSON holds."""
        return {name: _lists(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Gate:
        """The inverse of ``to_json``, bit for bit."""
        return cls(**{name: _tuples(value) for name, value in kept.items()})


def agreement(p_SmC: np.ndarray) -> np.ndarray:
    """Mean over pairs i < j of Σ_c p_ic p_jc, for each of S sets: float64 [S]."""
    count = p_SmC.shape[1]
    total_S = np.square(p_SmC.sum(1)).sum(1) - np.square(p_SmC).sum((1, 2))
    return total_S / (count * (count - 1))


def evidence(p_SmC: np.ndarray, log_odds_Smm: np.ndarray) -> np.ndarray:
    """Mean over pairs i < j of log(1 + C Σ_c p_ic p_jc odds_ij), for each of S sets: float64 [S]."""
    count, classes = p_SmC.shape[1:]
    first, second = np.triu_indices(count, 1)
    agree_SP = (p_SmC @ p_SmC.transpose(0, 2, 1))[:, first, second]
    log_ratio_SP = np.log(np.maximum(classes * agree_SP, _LEAST)) + log_odds_Smm[:, first, second]
    return np.logaddexp(0.0, log_ratio_SP).mean(1)


def _of_size(
    count: int,
    p_nC: np.ndarray,
    z_nd: np.ndarray,
    labels_n: np.ndarray,
    edge: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float], float]:
    """Weights, means, deviations and threshold for sets of one size."""

    def measured(sets: int, related: bool) -> np.ndarray:
        members = [
            _few_classes(labels_n, count, rng)
            if related
            else rng.choice(len(p_nC), count, replace=False)
            for _ in range(sets)
        ]
        step = max(1, _CELLS // (count * max(p_nC.shape[1], count)))
        found = []
        for start in range(0, sets, step):
            of_Sm = np.stack(members[start : start + step])
            columns = [agreement(p_nC[of_Sm])]
            if count <= SIZES[-1]:
                z_Smd = z_nd[of_Sm]
                log_odds_Smm = edge[0] * (z_Smd @ z_Smd.transpose(0, 2, 1)) + edge[1]
                columns.append(evidence(p_nC[of_Sm], log_odds_Smm))
            found.append(np.stack(columns, 1))
        return np.concatenate(found)

    strangers = measured(_LEARNED if count <= SIZES[-1] else _STRANGERS, False)
    mean, deviation = strangers.mean(0), np.maximum(strangers.std(0), _LEAST)
    if count > SIZES[-1]:
        threshold = float(np.quantile((strangers - mean) / deviation, LEVEL))
        return (1.0, 0.0), (float(mean[0]), 0.0), (float(deviation[0]), 1.0), threshold
    related = measured(_LEARNED, True)
    rows = (np.concatenate([strangers, related]) - mean) / deviation
    positive = np.arange(len(rows)) >= len(strangers)
    weights = np.maximum(
        fit_balanced(rows, positive)[0], 0.0
    )  # more of either is never a sign against
    if not weights.any():
        weights = np.array([1.0, 0.0])
    weights = weights / weights.sum()
    fresh = (measured(_STRANGERS, False) - mean) / deviation
    threshold = float(np.quantile(fresh @ weights, LEVEL))
    return _pair(weights), _pair(mean), _pair(deviation), threshold


def _few_classes(labels_n: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Images of 1 to count/3 classes (log-uniform), of more where these have too few images."""
    classes = rng.permutation(np.unique(labels_n))
    most = max(1, min(count // 3, len(classes) // 2))
    wanted = int(np.exp(rng.uniform(0, np.log(most + 1))))
    for taken in range(wanted, len(classes) + 1):
        pool = np.flatnonzero(np.isin(labels_n, classes[:taken]))
        if len(pool) >= count:
            break
    return rng.choice(pool, count, replace=False)


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def _lists(value: Any) -> Any:
    return [_lists(one) for one in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
