"""The second gate, for sets that belong together: are they all of one class? Then their mean is the answer.

Two measures of a set of m images, q being its answer by EM with shares π of the classes:

- *likelihood*: (log Σ_c Π_i p_ic / C - Σ_i log Σ_c π_c p_ic) / m, how well one class explains the set compared
  with the mixture that EM found;
- *largest share*: max_c π_c.

Their weights are learned (``set_gate.py``): sets of two and three classes against sets of one. 97 of 100
sets of two or three classes keep their mixture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cnn2gnn_dist.inference.sets.related import rows_by_class
from cnn2gnn_dist.inference.sets.set_gate import OfSize, SetGate

LEVEL = 0.97
SIZES = (2, 4, 8, 16, 32, 64)
_SETS = 600
_CELLS = 4_000_000


def measures(log_p_SmC: np.ndarray, q_SmC: np.ndarray, alpha: float) -> np.ndarray:
    """Likelihood and largest share of S sets: float64 [S, 2].

    Args:
        log_p_SmC: log-probabilities of each image alone.
        q_SmC: their probabilities after EM.
        alpha: of the prior of the shares, as in EM.
    """
    count, classes = log_p_SmC.shape[1:]
    share_SC = (q_SmC.sum(1) + alpha) / (count + classes * alpha)
    mixture_S = np.log((np.exp(log_p_SmC) * share_SC[:, None]).sum(2)).sum(1)
    one_S = np.logaddexp.reduce(log_p_SmC.sum(1), axis=1) - np.log(classes)
    return np.stack([(one_S - mixture_S) / count, share_SC.max(1)], 1)


def fit_one_class(
    log_p_nC: np.ndarray,
    labels_n: np.ndarray,
    measured: Callable[[np.ndarray], np.ndarray],
    seed: int,
) -> SetGate | None:
    """Fit the gate on calibration images; None: no class has enough images.

    Args:
        log_p_nC: log-probabilities.
        labels_n: classes.
        measured: rows of images [S, m] to the measures of these sets [S, 2].
        seed: of the sets that are drawn.
    """
    of_class = rows_by_class(labels_n)
    images_C = sorted(len(rows) for rows in of_class)
    # At least half of the classes have enough images for a set, and two classes together as well.
    sizes = [m for m in SIZES if m <= images_C[len(images_C) // 2]]
    fitted: list[OfSize] = []
    for count in sizes:
        rng = np.random.default_rng([seed, count, 1])
        large = [rows for rows in of_class if len(rows) >= count]
        step = max(1, _CELLS // (count * max(log_p_nC.shape[1], count)))
        several = [2] if count < 4 else [2, 3]
        no, yes, fresh = (
            _in_pieces(measured, [_of_classes(large, count, kinds[n % len(kinds)], rng) for n in range(_SETS)], step)
            for kinds in (several, [1], several)
        )  # fmt: skip
        fitted.append(OfSize.fit(no, yes, fresh, LEVEL))
    return SetGate(tuple(sizes), tuple(fitted)) if fitted else None


def _in_pieces(
    measured: Callable[[np.ndarray], np.ndarray], members: list[np.ndarray], step: int
) -> np.ndarray:
    pieces = range(0, len(members), step)
    return np.concatenate([measured(np.stack(members[at : at + step])) for at in pieces])


def _of_classes(
    large: list[np.ndarray], count: int, classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Images of exactly this many classes (if there are as many), at least one of each."""
    chosen = rng.choice(len(large), min(classes, len(large)), replace=False)
    images_K = 1 + rng.multinomial(count - len(chosen), np.full(len(chosen), 1 / len(chosen)))
    return np.concatenate(
        [rng.choice(large[c], n, replace=False) for c, n in zip(chosen, images_K, strict=True)]
    )
