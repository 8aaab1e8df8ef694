"""The gate for answering a set of images together: do they belong together?

Two measures of a set, each a mean over its pairs i < j, with p the class probabilities of the images alone:

- *agreement*: Σ_c p_ic p_jc, the probability of the same class if there were no features;
- *evidence*: log(1 + C · Σ_c p_ic p_jc · odds_ij), where odds_ij = exp(a·cos(z_i, z_j) + b) is how much more
  likely the two features are in images of one class than of two.

Their weights are learned (``set_gate.py``): random sets of calibration images against sets of few classes
among them. The threshold is the lowest at which random sets, answered together where they pass, lose at most
0.12 points of accuracy on average; between 90 and 99.5 of 100 don't pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cnn2gnn_dist.inference.sets.set_gate import OfSize, SetGate, scores

LOSS = 0.0012
LEVELS = (0.90, 0.995)
LEVEL = 0.98
"""Sizes of large sets."""
SIZES = (2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64)
LARGE = (91, 128, 181, 256, 512, 1024)
"""Size from which only agreement is used: it nearly always decides, and evidence costs m² logarithms."""
_STRANGERS = 4000  # random sets of each size: the standard error of the level is 0.2 %
_LEARNED = 800  # random sets and as many related ones, from which the weights are learned
_CELLS = 4_000_000  # numbers handled at once
_LEAST = 1e-12


def related_score(gate: SetGate, p_mC: np.ndarray, log_odds_mm: np.ndarray) -> tuple[float, float]:
    """The score of a set of at least two images, and what it has to exceed.

    Args:
        gate: of ``fit_related``.
        p_mC: class probabilities of each image alone.
        log_odds_mm: a·cos(z_i, z_j) + b.
    """
    of = gate.at(len(p_mC))
    measures = np.array([agreement(p_mC[None])[0], 0.0])
    if of.weights[1]:
        measures[1] = evidence(p_mC[None], log_odds_mm[None])[0]
    return float(scores(of, measures[None])[0]), of.threshold


def fit_related(
    p_nC: np.ndarray,
    z_nd: np.ndarray,
    labels_n: np.ndarray,
    edge: tuple[float, float],
    lost: Callable[[np.ndarray], np.ndarray],
    seed: int,
) -> SetGate:
    """Fit the gate on calibration images; bit-identical for the same seed.

    Args:
        p_nC: class probabilities.
        z_nd: features of unit length.
        labels_n: classes.
        edge: a and b of the odds.
        lost: maps rows of images [S, m] to the accuracy that each set loses if it is answered together.
        seed: of the random sets.
    """
    z_nd, labels_n = np.asarray(z_nd, np.float64), np.asarray(labels_n)
    sizes = [m for m in (*SIZES, *LARGE) if m <= max(2, len(labels_n) // 4)]
    fitted: list[OfSize] = []
    for count in sizes:
        rng = np.random.default_rng([seed, count])
        if count in SIZES:
            fitted.append(_with_evidence(count, p_nC, z_nd, labels_n, edge, lost, rng))
        else:
            fitted.append(_agreement_alone(count, p_nC, fitted[-1], rng))
    return SetGate(tuple(sizes), tuple(fitted))


def agreement_gate(sizes: list[int], thresholds: list[float]) -> SetGate:
    """The gate of models from before it was learned: agreement against a threshold."""
    fitted = [OfSize((1.0, 0.0), (0.0, 0.0), (1.0, 1.0), threshold) for threshold in thresholds]
    return SetGate(tuple(sizes), tuple(fitted))


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


def rows_by_class(labels_n: np.ndarray) -> list[np.ndarray]:
    """The images of each class that has any."""
    order_n = np.argsort(labels_n, kind="stable")
    starts = np.unique(labels_n[order_n], return_index=True)[1][1:]
    return np.split(order_n, starts)


def few_classes(of_class: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Images of 1 to count/3 classes (log-uniform), of more where these have too few images."""
    most = max(1, min(count // 3, len(of_class) // 2))
    wanted = int(np.exp(rng.uniform(0, np.log(most + 1))))
    pool: list[np.ndarray] = []
    for taken in rng.permutation(len(of_class)):
        pool.append(of_class[taken])
        if len(pool) >= wanted and sum(map(len, pool)) >= count:
            break
    return rng.choice(np.concatenate(pool), count, replace=False)


def _with_evidence(
    count: int,
    p_nC: np.ndarray,
    z_nd: np.ndarray,
    labels_n: np.ndarray,
    edge: tuple[float, float],
    lost: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> OfSize:
    def measured(members_Sm: np.ndarray) -> np.ndarray:
        step = max(1, _CELLS // (count * max(p_nC.shape[1], count)))
        found = []
        for start in range(0, len(members_Sm), step):
            of_Sm = members_Sm[start : start + step]
            z_Smd = z_nd[of_Sm]
            log_odds_Smm = edge[0] * (z_Smd @ z_Smd.transpose(0, 2, 1)) + edge[1]
            p_SmC = p_nC[of_Sm]
            found.append(np.stack([agreement(p_SmC), evidence(p_SmC, log_odds_Smm)], 1))
        return np.concatenate(found)

    strangers = measured(random_sets(len(p_nC), count, _LEARNED, rng))
    of_class = rows_by_class(labels_n)
    related = measured(np.stack([few_classes(of_class, count, rng) for _ in range(_LEARNED)]))
    members_Sm = random_sets(len(p_nC), count, _STRANGERS, rng)
    fresh = measured(members_Sm)
    gate = OfSize.fit(strangers, related, fresh, LEVEL)
    return replace(gate, threshold=_affordable(scores(gate, fresh), members_Sm, lost))


def _affordable(
    score_S: np.ndarray, members_Sm: np.ndarray, lost: Callable[[np.ndarray], np.ndarray]
) -> float:
    """The lowest threshold at which these sets lose no more than LOSS on average."""
    order_S = np.argsort(-score_S, kind="stable")
    fewest, most = (round((1 - level) * len(score_S)) for level in LEVELS[::-1])
    lost_R = np.cumsum(lost(members_Sm[order_S[:most]])) / len(score_S)
    # The loss is a random walk: use where it first exceeds the limit, not where it last does.
    beyond = np.flatnonzero(lost_R > LOSS)
    passing = max(fewest, int(beyond[0]) if len(beyond) else most)
    return float(score_S[order_S[passing]])


def _agreement_alone(
    count: int, p_nC: np.ndarray, last: OfSize, rng: np.random.Generator
) -> OfSize:
    """``last``: of the size before, whose scale of evidence holds in between."""
    members_Sm = random_sets(len(p_nC), count, _STRANGERS, rng)
    step = max(1, _CELLS // (count * p_nC.shape[1]))
    found = np.concatenate(
        [agreement(p_nC[members_Sm[at : at + step]]) for at in range(0, _STRANGERS, step)]
    )
    mean, deviation = float(found.mean()), max(float(found.std()), _LEAST)
    threshold = float(np.quantile((found - mean) / deviation, LEVEL))
    return OfSize((1.0, 0.0), (mean, last.means[1]), (deviation, last.deviations[1]), threshold)


def random_sets(images: int, count: int, sets: int, rng: np.random.Generator) -> np.ndarray:
    """Sets of different images, drawn from all: indices [sets, count]."""
    return np.stack([rng.choice(images, count, replace=False) for _ in range(sets)])
