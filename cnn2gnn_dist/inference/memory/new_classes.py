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

**From about a hundred images on** the column of a class is learned: u·(x, log Σ exp l) + v takes the place of the first
term, by class-balanced cross-entropy over rows of the memory and the images of all such classes, from u = 0 on, with a
penalty on u; then τ as above. It takes seconds and is convex: the same inputs give the same columns. Classes with
fewer images keep their first term, and change no column: beside 500 images of a class, five of another one leave it
recognized nearly as before, where a return to means would cost a quarter of that. All share one τ.

Features: the stem's x, centered and of unit length (``OldClasses.features``), not the graph's projection z,
which finds half as many new images: it keeps only what distinguishes the old classes.

Only the entries matter, not the order of edits: adding one class after another gives the same result as
adding them at once (learned columns: up to rounding, if the classes come in another order), and without
new classes S is bit-identical to the head's log softmax(l/T).

Shapes: N rows of the memory, n calibration or new images, C old and K new classes, D dimensions of x.
Pure: arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import log_softmax
from cnn2gnn_dist.inference.memory.new_class_scores import Scorer, held_out, joined, thinned
from cnn2gnn_dist.inference.memory.old_classes import Images, OldClasses, to_json

LEARNED_FROM = 100
"""Number of images from which the column of a class is learned."""
LOSSES = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
"""Points that old classes may lose, for which the trade-off is predicted."""


@dataclass(frozen=True)
class Trade:
    """What one offset costs and gains, in % of correctly answered images.

    Attributes:
        old_loss: points that the old classes may lose.
        offset: τ.
        old: accuracy on calibration images of the old classes.
        new: accuracy on the new images, each answered without itself (those of a learned column by
            cross-validation); the mean over classes. None if no class has two images.
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
        old_before: accuracy of the head on the calibration images without any new class, in %.
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
        """Whether the column of any class was learned, rather than its mean taken."""
        return bool(self.column_KE.any())

    def is_learned(self, name: str) -> bool:
        """Whether the column of this class was learned."""
        return bool(self.column_KE[self.names.index(name)].any())

    @classmethod
    def fit(
        cls,
        old: OldClasses,
        entries: Mapping[str, Images],
        calibration: Images,
        labels_n: np.ndarray,
        *,
        alone_nC: np.ndarray | None = None,
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
            alone_nC: logits of the calibration images if no image of a new class were in the memory, where some may
                be among their neighbors; None: the same.
            old_loss: points of accuracy that the old classes may lose on the calibration images.
            replay: rows of the memory of the old classes, to learn columns against; None: means are
                used regardless of the number of images.
            learned_from: number of images of a new class from which its column is learned.

        Raises:
            UserError: a class without images, an image without features, ``old_loss`` outside 0..100.
        """
        _check(entries, old_loss)
        names = tuple(entries)
        images = joined(list(entries.values()), calibration)
        class_n = np.repeat(np.arange(len(names)), [len(of) for of in entries.values()])
        learn_K = np.array([len(of) >= learned_from for of in entries.values()], bool)
        learn_K &= replay is not None
        replay = thinned(replay) if replay is not None and learn_K.any() else None
        model = Scorer.fit(old, images, class_n, learn_K, replay)
        margin_n, right_n = _margins(old, model, calibration, labels_n)
        held_out_nK = held_out(old, images, class_n, model, replay)
        head_n = log_softmax(images.logits_nC, old.temperature).max(1, initial=-np.inf)
        alone_nC = calibration.logits_nC if alone_nC is None else alone_nC
        right_before = int((alone_nC.argmax(1) == labels_n).sum())
        before = 100 * right_before / len(labels_n)

        def trade(points: float) -> Trade:
            offset = _offset(margin_n, right_n, points, right_before)
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
        model = Scorer(self.count_K, self.mean_KD, self.column_KE)
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

    @property
    def judged_on(self) -> float:
        """Number of images of one class whose accuracy is as certain as the mean over classes of ``Trade.new``.

        Classes of one image don't count. 0: there are no others.
        """
        count_K = self.count_K[self.count_K > 1]
        return len(count_K) ** 2 / float((1 / count_K).sum()) if len(count_K) else 0.0

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


def _margins(
    old: OldClasses, model: Scorer, calibration: Images, labels_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By how much each calibration image stays old (the largest τ at which it does), and whether it is right."""
    head_nC = log_softmax(calibration.logits_nC, old.temperature)
    right_n = head_nC.argmax(1) == labels_n
    if not len(model.count_K):
        return np.full(len(labels_n), np.inf), right_n
    return head_nC.max(1) - model.scores(old, calibration).max(1), right_n


def _offset(margin_n: np.ndarray, right_n: np.ndarray, old_loss: float, right_before: int) -> float:
    """The largest τ with which at most ``old_loss`` points of the images fewer are right than before."""
    margins = np.sort(margin_n[right_n])
    may_turn = int(old_loss * len(margin_n) / 100 + 1e-9)
    may_turn = max(may_turn - (right_before - len(margins)), 0)
    if may_turn < len(margins):
        return float(margins[may_turn])
    return float(margin_n.max()) + 1.0  # all images may be lost


def _accuracy(scores_nK: np.ndarray, head_n: np.ndarray, class_n: np.ndarray) -> float | None:
    """Mean over new classes of the % of images that are answered with their class."""
    known_n = np.isfinite(scores_nK).all(1)
    if not known_n.any():
        return None
    right_n = (scores_nK.argmax(1) == class_n) & (scores_nK.max(1) > head_n)
    by_class = [right_n[known_n & (class_n == k)].mean() for k in np.unique(class_n[known_n])]
    return 100 * float(np.mean(by_class))


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
