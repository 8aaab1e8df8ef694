"""Random sets of calibration images, of the kinds that a set may be of: what the set network learns from.

Of every hundred sets 35 are *strangers* (any images), 25 a *burst* (one class), and 40 a *mixture* of 2 to m/2
classes (log-uniform) in random proportions (Dirichlet(2, …, 2), at least one image of each). Pure.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_TRIES = 20


class Kind(IntEnum):
    """What a set is composed of."""

    STRANGERS = 0
    BURST = 1
    MIXTURE = 2


SHARES = {Kind.STRANGERS: 0.35, Kind.BURST: 0.25, Kind.MIXTURE: 0.40}


def draw(
    of_class: list[np.ndarray], count: int, kind: Kind, rng: np.random.Generator
) -> tuple[np.ndarray, Kind]:
    """Draw a set of different images: indices [m], and the kind that it is.

    If classes have too few images, more classes than asked for are used; where even these have too few for the
    proportions that were drawn, the set is one of strangers and counts as such.

    Args:
        of_class: the images of each class; ``count`` images or more in all.
        count: m.
        kind: of the set.
        rng: of all random draws.
    """
    if kind is not Kind.STRANGERS:
        wanted = 1 if kind is Kind.BURST else _classes(count, len(of_class), rng)
        for _ in range(_TRIES):
            chosen = rng.permutation(len(of_class))[:wanted]
            images_K = 1 + rng.multinomial(
                count - len(chosen), rng.dirichlet(np.full(len(chosen), 2.0))
            )
            if all(len(of_class[c]) >= n for c, n in zip(chosen, images_K, strict=True)):
                parts = [
                    rng.choice(of_class[c], n, replace=False)
                    for c, n in zip(chosen, images_K, strict=True)
                ]
                return np.concatenate(parts), kind
            wanted = min(wanted + 1, count, len(of_class))
    return rng.choice(np.concatenate(of_class), count, replace=False), Kind.STRANGERS


def _classes(count: int, classes: int, rng: np.random.Generator) -> int:
    most = max(2, count // 2)
    return min(classes, count, int(np.exp(rng.uniform(np.log(2), np.log(most + 1)))))
