"""New classes without training: rule R.

The old classes keep their head. With l the head's logits, f features (centered, of unit length), μ class means

    S_c = log softmax(l/T)_c                                                        old c
    S_c = log softmax(10·cos(f, μ))_c + κ·log p(f | c) − log Σ_old p(f | c')^κ + τ       new c

and the answer is the c with the largest S_c. The first term compares directions with all class means, old
and new; the second is the log odds of a new class against an old one, under a model of the distribution of f.
Either alone finds fewer images of new classes at the same loss (``benchmarks/memory.py``). τ is not guessed: it
is the largest value at which held-out images of the old classes, with the new entries in place, lose at most
``old_loss`` points of accuracy.

Both terms: ``old_classes.py``.

***From about a hundred images per class** columns are learned: u·(x, log Σ exp l) + v takes the place of the first
term, by class-balanced cross-entropy over rows of the memory and the new images, from u = 0 on, with a
penalty on u; then τ as above. It takes seconds and is convex: the same inputs give the same columns.

Features: the stem's x, centered and of unit length (``OldClasses.features``), not the graph's projection z,
which finds half as many new images: it keeps only what distinguishes the old classes.

Only the entries matter, not the order of edits: adding one class after another gives the same result as
adding them at once (learned columns: up to rounding, if the classes come in another order), and without
new classes S is bit-identical to the head's log softmax(l/T).

Shapes: N rows of the memory, n calibration or new images, C old and K new classes, D dimensions of x.
Pure: arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import log_softmax
from cnn2gnn_dist.inference.memory.old_classes import Images, OldClasses, dot, log_sum, to_json

LEARNED_FROM = 100
"""Number of images from which the column of a class is learned."""
LOSSES = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
"""Points that old classes may lose, for which the trade-off is predicted."""
FOLDS = 5
PENALTY = 0.1
"""Penalty on the squares of a column, relative to the mean loss of its class."""
_REPLAY = 20_000  # rows of the memory that columns are learned against
_STEPS = 200


@dataclass(frozen=True)
class Trade:
    """What one offset costs and gains, in % of correctly answered images.

    Attributes:
        old_loss: points that the old classes may lose.
        offset: τ.
        old: accuracy on calibration images of the old classes.
        new: accuracy on the new images, each answered without itself (by cross-validation where
            columns are learned); the mean over classes. None if no class has two images.
    """

    old_loss: float
    offset: float
    old: float
    new: float | None


@dataclass(frozen=True, eq=False)
class NewClasses:
    """New classes alongside the old ones.

    Attributes:
        names: of the K new classes, in the order of their columns.
        count_K: number of images of each.
        mean_KD: class means of f.
        column_KE: what was learned: u over x and log Σ exp(l/T), both standardized, and v [K, D + 2]; zeros for means.
        offset: τ.
        old_loss: points that τ was chosen for.
        trades: predicted accuracies over a range of τ, the chosen one among them.
        old_before: accuracy of the head alone on the calibration images, in %.
    """

    names: tuple[str, ...]
    count_K: np.ndarray
    mean_KD: np.ndarray
    column_KE: np.ndarray
    offset: float
    old_loss: float
    trades: tuple[Trade, ...]
    old_before: float

    @property
    def learned(self) -> bool:
        """Whether columns were learned, rather than means taken."""
        return bool(self.column_KE.any())

    @classmethod
    def fit(
        cls,
        old: OldClasses,
        entries: Mapping[str, Images],
        calibration: Images,
        labels_n: np.ndarray,
        *,
        old_loss: float = 1.0,
        replay: Images | None = None,
        learned_from: int = LEARNED_FROM,
    ) -> NewClasses:
        """Fit the scores of new classes, given all of their images in the memory.

        Args:
            old: the old classes.
            entries: images of each new class, by its name.
            calibration: held-out images of the old classes.
            labels_n: their classes.
            old_loss: points of accuracy that the old classes may lose on the calibration images.
            replay: rows of the memory of the old classes, to learn columns against; None: means are
                used regardless of the number of images.
            learned_from: number of images of the smallest new class from which columns are learned.

        Raises:
            UserError: a class without images, an image without features, ``old_loss`` outside 0..100.
        """
        _check(entries, old_loss)
        names = tuple(entries)
        images = _joined(list(entries.values()), calibration)
        class_n = np.repeat(np.arange(len(names)), [len(of) for of in entries.values()])
        learn = replay is not None and bool(names)
        learn = learn and min(len(of) for of in entries.values()) >= learned_from
        replay = _thinned(replay) if replay is not None and learn else None
        model = _Scorer.fit(old, images, class_n, len(names), replay)
        margin_n, right_n = _margins(old, model, calibration, labels_n)
        held_out_nK = _held_out(old, images, class_n, model, replay)
        head_n = log_softmax(images.logits_nC, old.temperature).max(1, initial=-np.inf)
        before = 100 * float(right_n.mean())

        def trade(points: float) -> Trade:
            offset = _offset(margin_n, right_n, points)
            after = 100 * float((right_n & (offset <= margin_n)).mean())
            new = _accuracy(held_out_nK + offset, head_n, class_n)
            return Trade(points, offset, after, new)

        trades = [trade(points) for points in sorted({*LOSSES, float(old_loss)})] if names else []
        offset = next((t.offset for t in trades if t.old_loss == old_loss), 0.0)
        return cls(
            names, model.count_K, model.mean_KD, model.column_KE, offset, old_loss,
            tuple(trades), before,
        )  # fmt: skip

    def scores(self, old: OldClasses, logits_BC: np.ndarray, x_BD: np.ndarray) -> np.ndarray:
        """S, float64 [B, C + K]; the largest is the answer, ties to the old classes.

        Rows don't depend on each other. Without new classes: log softmax(l/T).
        """
        head_BC = log_softmax(logits_BC, old.temperature)
        if not self.names:
            return head_BC
        model = _Scorer(self.count_K, self.mean_KD, self.column_KE)
        new_BK = model.scores(old, Images(logits_BC, x_BD)) + self.offset
        return np.concatenate([head_BC, new_BK], 1)

    def probabilities(self, old: OldClasses, logits_BC: np.ndarray, x_BD: np.ndarray) -> np.ndarray:
        """softmax(S), float64 [B, C + K]: Bayes' rule with the prior odds that τ stands for."""
        return np.exp(log_softmax(self.scores(old, logits_BC, x_BD)))

    def lost(
        self, old: OldClasses, calibration: Images, labels_n: np.ndarray
    ) -> list[tuple[int, int, int]]:
        """Old classes that lose half or more of their right answers to new ones: (class, lost, right before).

        ``old_loss`` is a mean over images, of which a rare class has few. Those that lose a single one don't count.
        """
        scores_nK = self.scores(old, calibration.logits_nC, calibration.x_nD)
        classes = len(old.count_C)
        right_n = scores_nK[:, :classes].argmax(1) == labels_n
        turned_n = right_n & (scores_nK.argmax(1) >= classes)
        right_C = np.bincount(labels_n[right_n], minlength=classes)
        turned_C = np.bincount(labels_n[turned_n], minlength=classes)
        found = np.flatnonzero((turned_C > 1) & (2 * turned_C >= right_C))
        return [(int(c), int(turned_C[c]), int(right_C[c])) for c in found]

    def to_json(self) -> dict[str, Any]:
        """As JSON-compatible data."""
        trades = [[t.old_loss, t.offset, t.old, t.new] for t in self.trades]
        return to_json(self) | {"names": list(self.names), "trades": trades}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> NewClasses:
        """The inverse of ``to_json``, bit for bit."""
        return cls(
            tuple(kept["names"]),
            np.array(kept["count_K"], np.int64),
            np.array(kept["mean_KD"], np.float64),
            np.array(kept["column_KE"], np.float64),
            float(kept["offset"]),
            float(kept["old_loss"]),
            tuple(Trade(*row) for row in kept["trades"]),
            float(kept["old_before"]),
        )


@dataclass(frozen=True, eq=False)
class _Scorer:
    """Scores of new classes without the offset: from means, and from what was learned on top."""

    count_K: np.ndarray
    mean_KD: np.ndarray
    column_KE: np.ndarray

    @classmethod
    def fit(
        cls, old: OldClasses, images: Images, class_n: np.ndarray, new: int, replay: Images | None
    ) -> _Scorer:
        f_nD = old.features(images.x_nD).f_BD
        count_K = np.bincount(class_n, minlength=new)
        mean_KD = np.stack([f_nD[class_n == k].mean(0) for k in range(new)]) if new else f_nD[:0]
        scorer = cls(count_K, mean_KD, np.zeros((new, f_nD.shape[1] + 2)))
        if replay is None:
            return scorer
        both = _joined([replay, images], replay)
        column_KE = _learned(
            scorer.log_odds(old, both),
            _inputs(old, both),
            np.concatenate([np.zeros(len(replay), np.int64), class_n + 1]),
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
        """[B, K]; ``own`` replaces both terms of image i in class ``class_B[i]`` (without columns)."""
        if self.column_KE.any():
            return self.log_odds(old, images) + dot(_inputs(old, images), self.column_KE)
        features = old.features(images.x_nD)
        cos_BK, density_BK = old.scorer(self.mean_KD, self.count_K).of_each(features)
        if own is not None:
            rows_B = np.arange(len(cos_BK))
            cos_BK[rows_B, class_B], density_BK[rows_B, class_B] = own
        cos_BC, density_BC = old.known.of_each(features)
        # Sorted, so that the order of new classes doesn't change the bits.
        scores_BK = cos_BK - log_sum(np.concatenate([cos_BC, np.sort(cos_BK, 1)], 1))
        scores_BK += old.sharpness * density_BK - log_sum(old.sharpness * density_BC)
        return scores_BK

    def log_odds(self, old: OldClasses, images: Images) -> np.ndarray:
        """The second term alone, [B, K]."""
        features = old.features(images.x_nD)
        _, density_BK = old.scorer(self.mean_KD, self.count_K).of_each(features)
        _, density_BC = old.known.of_each(features)
        return old.sharpness * density_BK - log_sum(old.sharpness * density_BC)


def _inputs(old: OldClasses, images: Images) -> np.ndarray:
    """Inputs of the columns: x and log Σ exp(l/T), both standardized, and 1: [B, D + 2]."""
    x_BD = (np.asarray(images.x_nD, np.float64) - old.zero_D) / old.spread_D
    energy_B1 = log_sum(np.asarray(images.logits_nC, np.float64) / old.temperature)
    energy_B1 = (energy_B1 - old.energy_2[0]) / old.energy_2[1]
    return np.concatenate([x_BD, energy_B1, np.ones_like(energy_B1)], 1)


def _learned(
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


def _margins(
    old: OldClasses, model: _Scorer, calibration: Images, labels_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By how much each calibration image stays old (the largest τ at which it does), and whether it is right."""
    head_nC = log_softmax(calibration.logits_nC, old.temperature)
    right_n = head_nC.argmax(1) == labels_n
    if not len(model.count_K):
        return np.full(len(labels_n), np.inf), right_n
    return head_nC.max(1) - model.scores(old, calibration).max(1), right_n


def _offset(margin_n: np.ndarray, right_n: np.ndarray, old_loss: float) -> float:
    """The largest τ with which at most ``old_loss`` points of the images turn from right to wrong."""
    margins = np.sort(margin_n[right_n])
    may_turn = int(old_loss * len(margin_n) / 100 + 1e-9)
    if may_turn < len(margins):
        return float(margins[may_turn])
    return float(margin_n.max()) + 1.0  # all images may be lost


def _held_out(
    old: OldClasses, images: Images, class_n: np.ndarray, model: _Scorer, replay: Images | None
) -> np.ndarray:
    """Scores [n, K] of the new images, each without itself; NaN in rows of classes of one image."""
    new = len(model.count_K)
    if replay is not None:
        scores_nK = np.full((len(class_n), new), np.nan)
        place_n = np.concatenate([np.arange((class_n == k).sum()) for k in range(new)])
        for fold in range(FOLDS):
            out_n = place_n % FOLDS == fold
            part = _Scorer.fit(old, images[~out_n], class_n[~out_n], new, replay)
            scores_nK[out_n] = part.scores(old, images[out_n])
        return scores_nK
    count_n = model.count_K[class_n]
    features = old.features(images.x_nD)
    mean_nD = count_n[:, None] * model.mean_KD[class_n] - features.f_BD
    without = old.scorer(mean_nD / np.maximum(count_n - 1, 1)[:, None], count_n - 1)
    scores_nK = model.scores(old, images, without.of_own(features), class_n)
    scores_nK[count_n < 2] = np.nan
    return scores_nK


def _accuracy(scores_nK: np.ndarray, head_n: np.ndarray, class_n: np.ndarray) -> float | None:
    """Mean over new classes of the % of images that are answered with their class."""
    known_n = np.isfinite(scores_nK).all(1)
    if not known_n.any():
        return None
    right_n = (scores_nK.argmax(1) == class_n) & (scores_nK.max(1) > head_n)
    by_class = [right_n[known_n & (class_n == k)].mean() for k in np.unique(class_n[known_n])]
    return 100 * float(np.mean(by_class))


def _thinned(replay: Images) -> Images:
    """At most _REPLAY rows, evenly spaced: no random numbers, the same rows each time."""
    rows = np.arange(0, len(replay), max(1, -(-len(replay) // _REPLAY)))
    return replay[rows]


def _joined(parts: Sequence[Images], like: Images) -> Images:
    parts = [*parts] or [like[np.arange(0)]]
    return Images(
        np.concatenate([part.logits_nC for part in parts]),
        np.concatenate([part.x_nD for part in parts]),
    )


def _check(entries: Mapping[str, Images], old_loss: float) -> None:
    if not 0 <= old_loss < 100:
        raise UserError(
            f"old classes may lose {old_loss} points",
            where="--old-loss",
            remedy="0 or more and less than 100, such as 1",
        )
    for name, images in entries.items():
        if not len(images):
            raise UserError(
                f"class {name} has no images", where=name, remedy="add images, or remove the class"
            )
        if not (np.isfinite(images.x_nD).all() and images.x_nD.any(1).all()):
            raise UserError(
                f"an image of class {name} has no features",
                where=name,
                remedy="leave out images that can't be read",
            )
