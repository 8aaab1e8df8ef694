"""Scores of new classes before any offset: from means, and from columns that were learned (``new_classes.py``).

Shapes: n images, K new classes, D dimensions of x, E = D + 2 inputs of a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from cnn2gnn_dist.inference.memory.old_classes import Images, OldClasses, dot, log_sum

FOLDS = 5
PENALTY = 0.1
"""Penalty on the squares of a column, relative to the mean loss of its class."""
_REPLAY = 20_000  # rows of the memory that columns are learned against
_STEPS = 200


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores of new classes without the offset: from means, or from columns where those are not zero.

    Attributes: see ``NewClasses``.
    """

    count_K: np.ndarray
    mean_KD: np.ndarray
    column_KE: np.ndarray

    @property
    def learned_K(self) -> np.ndarray:
        """Bool, whether the column of a class was learned."""
        return np.any(self.column_KE != 0, axis=1)

    @classmethod
    def fit(
        cls,
        old: OldClasses,
        images: Images,
        class_n: np.ndarray,
        learn_K: np.ndarray,
        replay: Images | None,
    ) -> Scorer:
        """Fit to images of the new classes; the columns of ``learn_K`` are learned, against ``replay``.

        A column depends on the images of these classes alone: others, added to or removed from the memory, leave it
        as it is.
        """
        f_nD = old.features(images.x_nD).f_BD
        new = len(learn_K)
        count_K = np.bincount(class_n, minlength=new)
        mean_KD = np.stack([f_nD[class_n == k].mean(0) for k in range(new)]) if new else f_nD[:0]
        column_KE = np.zeros((new, f_nD.shape[1] + 2))
        if replay is not None and learn_K.any():
            mine_n = learn_K[class_n]
            both = joined([replay, images[mine_n]], replay)
            place_K = np.cumsum(learn_K)  # 0: the old ones
            column_KE[learn_K] = learned_columns(
                cls(count_K, mean_KD, column_KE).log_odds(old, both)[:, learn_K],
                inputs_of(old, both),
                np.concatenate([np.zeros(len(replay), np.int64), place_K[class_n[mine_n]]]),
                len(old.count_C),
            )
        return cls(count_K, mean_KD, column_KE)

    def scores(
        self,
        old: OldClasses,
        images: Images,
        own: tuple[np.ndarray, np.ndarray] | None = None,
        class_B: np.ndarray | None = None,
    ) -> np.ndarray:
        """[B, K]; ``own`` replaces both terms of image i in class ``class_B[i]``, one without a column."""
        features = old.features(images.x_nD)
        cos_BK, density_BK = old.scorer(self.mean_KD, self.count_K).of_each(features)
        if own is not None:
            rows_B = np.arange(len(cos_BK))
            cos_BK[rows_B, class_B], density_BK[rows_B, class_B] = own
        cos_BC, density_BC = old.known.of_each(features)
        odds_BK = old.sharpness * density_BK - log_sum(old.sharpness * density_BC)
        learned_K = self.learned_K
        # Sorted, so that the order of new classes doesn't change the bits.
        scores_BK = cos_BK - log_sum(np.concatenate([cos_BC, np.sort(cos_BK, 1)], 1))
        if learned_K.any():
            scores_BK[:, learned_K] = dot(inputs_of(old, images), self.column_KE[learned_K])
        scores_BK += odds_BK
        return scores_BK

    def log_odds(self, old: OldClasses, images: Images) -> np.ndarray:
        """The second term alone, [B, K]."""
        features = old.features(images.x_nD)
        _, density_BK = old.scorer(self.mean_KD, self.count_K).of_each(features)
        _, density_BC = old.known.of_each(features)
        return old.sharpness * density_BK - log_sum(old.sharpness * density_BC)


def inputs_of(old: OldClasses, images: Images) -> np.ndarray:
    """Inputs of the columns: x and log Σ exp(l/T), both standardized, and 1: [B, D + 2]."""
    x_BD = (np.asarray(images.x_nD, np.float64) - old.zero_D) / old.spread_D
    energy_B1 = log_sum(np.asarray(images.logits_nC, np.float64) / old.temperature)
    energy_B1 = (energy_B1 - old.energy_2[0]) / old.energy_2[1]
    return np.concatenate([x_BD, energy_B1, np.ones_like(energy_B1)], 1)


def learned_columns(
    plain_NK: np.ndarray, inputs_NE: np.ndarray, target_N: np.ndarray, old: int
) -> np.ndarray:
    """Columns [K, E] by class-balanced cross-entropy over (old, new classes); old scores 0.

    With log softmax as the score of the old classes the loss over all classes differs from this one by a
    constant: only old or new, and which new, is learned. The old ones count as ``old`` classes.
    """
    plain, inputs = torch.from_numpy(plain_NK), torch.from_numpy(inputs_NE)
    target = torch.from_numpy(target_N)
    new = plain.shape[1]
    count = torch.bincount(target, minlength=new + 1)
    share = torch.ones(new + 1, dtype=torch.float64) / (old + new)
    share[0] *= old
    weight = (share / count.clamp(min=1))[target]
    columns = torch.zeros(new, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [columns], max_iter=_STEPS, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = F.pad(plain + inputs @ columns.T, (1, 0))
        each = F.cross_entropy(scores, target, reduction="none")
        penalty = PENALTY / (old + new) * columns[:, :-1].square().sum()
        total = (weight * each).sum() + penalty
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[arg-type]  # a closure may return a tensor
    return columns.detach().numpy()


def held_out(
    old: OldClasses, images: Images, class_n: np.ndarray, model: Scorer, replay: Images | None
) -> np.ndarray:
    """Scores [n, K] of the new images, each without itself; NaN in rows of classes of one image.

    Images of learned classes by cross-validation, the others one by one.
    """
    scores_nK = np.full((len(class_n), len(model.count_K)), np.nan)
    learned_K = model.learned_K
    place_n = np.concatenate([np.zeros(0, int), *(np.arange(count) for count in model.count_K)])
    for fold in range(FOLDS) if learned_K.any() else ():
        out_n = learned_K[class_n] & (place_n % FOLDS == fold)
        part = Scorer.fit(old, images[~out_n], class_n[~out_n], learned_K, replay)
        scores_nK[out_n] = part.scores(old, images[out_n])
    alone_n = np.flatnonzero(~learned_K[class_n] & (model.count_K[class_n] > 1))
    if len(alone_n):
        some, class_m = images[alone_n], class_n[alone_n]
        count_m1 = model.count_K[class_m][:, None]
        features = old.features(some.x_nD)
        mean_mD = (count_m1 * model.mean_KD[class_m] - features.f_BD) / (count_m1 - 1)
        own = old.scorer(mean_mD, count_m1[:, 0] - 1).of_own(features)
        scores_nK[alone_n] = model.scores(old, some, own, class_m)
    return scores_nK


def thinned(replay: Images) -> Images:
    """At most _REPLAY rows, evenly spaced: no random numbers, the same rows each time."""
    rows = np.arange(0, len(replay), max(1, -(-len(replay) // _REPLAY)))
    return replay[rows]


def joined(parts: Sequence[Images], like: Images) -> Images:
    """All images in order; ``like``: of which there are none if there are no parts."""
    parts = [*parts] or [like[np.arange(0)]]
    return Images(
        np.concatenate([part.logits_nC for part in parts]),
        np.concatenate([part.x_nD for part in parts]),
    )
