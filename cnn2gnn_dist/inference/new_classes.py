"""New classes without training: rule R.

The old classes keep their head. With l the head's logits, z the features, and a generative model of z

    S_c = log softmax(l/T)_c                                        old c
    S_c = κ·(log p(z | c) − log Σ_old c' p(z | c')) + τ              new c

and the answer is the c with the largest S_c: Bayes' rule, where the head says which old class, the model
of z says whether it is an old one at all, and τ stands for the log odds of meeting a new one. τ is not
guessed: it is the largest with which held-out images of the old classes, the new entries in place, lose
at most ``old_loss`` points of accuracy.

**The model of z** is the two-covariance model (probabilistic LDA without subspaces; Ioffe, ECCV 2006;
Brümmer, de Villiers, Odyssey 2010): a class mean is drawn from N(m, B), an image from N(mean, W). B and W are
those of the old classes in the memory, so that one image of a new class is already a class: with n
images of mean y, in coordinates where W = 1 and B = diag(b), its z is distributed as

    N(n b/(1 + n b)·y, 1 + b/(1 + n b)).

With few old classes B says nothing in most directions, so b is mixed with its mean in the share
d/(C − 1 + d). κ is fitted on calibration images of the old classes (by their likelihood).

**From about a hundred images a class** the new columns are learned: u·(z, log Σ exp l) + v is added to S_c, by
class-balanced cross-entropy over rows of the memory and the new images, from u = 0 on, with a penalty on u;
then τ as above. It takes seconds and is convex: the same inputs give the same columns.

Entries are all that counts, not the order of edits: adding one class after another gives what adding
them at once gives, and without new classes S is the head's log softmax(l/T), bit for bit.

Shapes: N rows of the memory, n calibration or new images, C old and K new classes, d dimensions of z.
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
from cnn2gnn_dist.inference.calibration import fit_temperature, log_softmax

LEARNED_FROM = 100
"""Images of a class from which on its column is learned."""
LOSSES = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
"""Points that old classes may lose, for which the trade is predicted."""
FOLDS = 5
PENALTY = 1e-3
_REPLAY = 20_000  # rows of the memory that columns are learned against
_RIDGE = 1e-2  # of W, relative to its mean variance
_STEPS = 200


@dataclass(frozen=True, eq=False)
class Images:
    """Images as rule R sees them.

    Attributes:
        logits_nC: the head's, over the old classes.
        z_nd: features of unit length.
    """

    logits_nC: np.ndarray
    z_nd: np.ndarray

    def __len__(self) -> int:
        return len(self.z_nd)

    def __getitem__(self, rows: np.ndarray) -> Images:
        return Images(self.logits_nC[rows], self.z_nd[rows])


@dataclass(frozen=True, eq=False)
class OldClasses:
    """The old classes: head's temperature, and the two-covariance model of their z.

    Attributes:
        temperature: T of the head.
        sharpness: κ.
        centre_d: m.
        axes_dd: rows are the directions in which W = 1 and B is diagonal: y = axes (z − m).
        between_d: b.
        mean_Cd: class means in y.
        count_C: rows of each class.
    """

    temperature: float
    sharpness: float
    centre_d: np.ndarray
    axes_dd: np.ndarray
    between_d: np.ndarray
    mean_Cd: np.ndarray
    count_C: np.ndarray

    @classmethod
    def fit(
        cls,
        z_Nd: np.ndarray,
        labels_N: np.ndarray,
        calibration: Images,
        labels_n: np.ndarray,
        *,
        temperature: float | None = None,
    ) -> OldClasses:
        """Fit to the memory's rows of the old classes, and κ to calibration images.

        Args:
            z_Nd: of the memory.
            labels_N: old classes, 0..C−1; others (of new classes, or -1) are left out.
            calibration: held-out images of the old classes.
            labels_n: their classes.
            temperature: T, if it is fitted already.

        Raises:
            UserError: no calibration images, or rows of fewer than two old classes.
        """
        temperature = temperature or fit_temperature(calibration.logits_nC, labels_n)
        classes = calibration.logits_nC.shape[1]
        old_N = (labels_N >= 0) & (labels_N < classes)
        z_Nd, labels_N = np.asarray(z_Nd, np.float64)[old_N], np.asarray(labels_N)[old_N]
        count_C = np.bincount(labels_N, minlength=classes)
        present_C = count_C > 0
        if present_C.sum() < 2 or len(z_Nd) <= present_C.sum():
            raise UserError(
                f"the memory has {len(z_Nd)} images of {int(present_C.sum())} old classes",
                where="memory",
                remedy="two old classes with two images or more show how classes differ",
            )
        centre_d, axes_dd, between_d, mean_Cd = _two_covariances(z_Nd, labels_N, count_C)
        flat = cls(temperature, 1.0, centre_d, axes_dd, between_d, mean_Cd, count_C)
        raw_nC = flat.log_density(flat.placed(calibration.z_nd), mean_Cd, count_C)
        sharpness = 1 / fit_temperature(raw_nC, labels_n)
        return cls(temperature, sharpness, centre_d, axes_dd, between_d, mean_Cd, count_C)

    def placed(self, z_Bd: np.ndarray) -> np.ndarray:
        """Y: z in the coordinates of the model, float64 [B, d]."""
        return _dot(np.asarray(z_Bd, np.float64) - self.centre_d, self.axes_dd)

    def log_density(self, y_Bd: np.ndarray, mean_Kd: np.ndarray, count_K: np.ndarray) -> np.ndarray:
        """Log p(z | class), up to a constant, from the mean and number of each class's images [B, K]."""
        n_K1 = np.asarray(count_K, np.float64)[:, None]
        spread_Kd = self.between_d / (1 + n_K1 * self.between_d)
        centre_Kd = n_K1 * spread_Kd * mean_Kd
        precision_Kd = 1 / (1 + spread_Kd)
        constant_K = (np.square(centre_Kd) * precision_Kd - np.log(precision_Kd)).sum(1)
        squares_BK = _dot(np.square(y_Bd), precision_Kd)
        return _dot(y_Bd, centre_Kd * precision_Kd) - 0.5 * (squares_BK + constant_K)

    def against_old(self, y_Bd: np.ndarray, mean_Kd: np.ndarray, count_K: np.ndarray) -> np.ndarray:
        """κ·log p(z | new class) − log Σ_old p(z | c')^κ, float64 [B, K]."""
        old_BC = self.sharpness * self.log_density(y_Bd, self.mean_Cd, self.count_C)
        return self.sharpness * self.log_density(y_Bd, mean_Kd, count_K) - _log_sum(old_BC)

    def to_json(self) -> dict[str, Any]:
        """As what JSON holds."""
        return _to_json(self)

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> OldClasses:
        """The inverse of ``to_json``, bit for bit."""
        arrays = {name: np.array(v) for name, v in kept.items() if isinstance(v, list)}
        arrays["count_C"] = arrays["count_C"].astype(np.int64)
        return cls(**(kept | arrays))


@dataclass(frozen=True)
class Trade:
    """What one offset costs and brings, in % of images answered right.

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
    """New classes beside the old ones.

    Attributes:
        names: of the K new classes, in the order of their columns.
        count_K: images of each.
        mean_Kd: class means in y.
        column_Kd: what was learned: u over (z, log Σ exp l) and v; zeros for means.
        offset: τ.
        old_loss: points that τ was chosen for.
        trades: predicted accuracies over a range of τ, the chosen one among them.
        old_before: accuracy of the head alone on the calibration images, in %.
    """

    names: tuple[str, ...]
    count_K: np.ndarray
    mean_Kd: np.ndarray
    column_Kd: np.ndarray
    offset: float
    old_loss: float
    trades: tuple[Trade, ...]
    old_before: float

    @property
    def learned(self) -> bool:
        """Whether columns were learned, rather than means taken."""
        return bool(self.column_Kd.any())

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
        """Score new classes, given all of their images that the memory has now.

        Args:
            old: the old classes.
            entries: images of each new class, by its name.
            calibration: held-out images of the old classes.
            labels_n: their classes.
            old_loss: points of accuracy that the old classes may lose on the calibration images.
            replay: rows of the memory of the old classes, to learn columns against; None: means are
                taken however many images there are.
            learned_from: images of the smallest new class from which on columns are learned.

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
            names, model.count_K, model.mean_Kd, model.column_Kd, offset, old_loss,
            tuple(trades), before,
        )  # fmt: skip

    def scores(self, old: OldClasses, logits_BC: np.ndarray, z_Bd: np.ndarray) -> np.ndarray:
        """S, float64 [B, C + K]; the largest is the answer, ties to the old classes.

        Rows don't depend on company. Without new classes: log softmax(l/T).
        """
        head_BC = log_softmax(logits_BC, old.temperature)
        if not self.names:
            return head_BC
        model = _Scorer(self.count_K, self.mean_Kd, self.column_Kd)
        new_BK = model.scores(old, Images(logits_BC, z_Bd)) + self.offset
        return np.concatenate([head_BC, new_BK], 1)

    def probabilities(self, old: OldClasses, logits_BC: np.ndarray, z_Bd: np.ndarray) -> np.ndarray:
        """softmax(S), float64 [B, C + K]: Bayes' rule with the prior odds that τ stands for."""
        return np.exp(log_softmax(self.scores(old, logits_BC, z_Bd)))

    def to_json(self) -> dict[str, Any]:
        """As what JSON holds."""
        trades = [[t.old_loss, t.offset, t.old, t.new] for t in self.trades]
        return _to_json(self) | {"names": list(self.names), "trades": trades}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> NewClasses:
        """The inverse of ``to_json``, bit for bit."""
        return cls(
            tuple(kept["names"]),
            np.array(kept["count_K"], np.int64),
            np.array(kept["mean_Kd"], np.float64),
            np.array(kept["column_Kd"], np.float64),
            float(kept["offset"]),
            float(kept["old_loss"]),
            tuple(Trade(*row) for row in kept["trades"]),
            float(kept["old_before"]),
        )


@dataclass(frozen=True, eq=False)
class _Scorer:
    """Scores of new classes without the offset: means, and what was learned on top."""

    count_K: np.ndarray
    mean_Kd: np.ndarray
    column_Kd: np.ndarray

    @classmethod
    def fit(
        cls, old: OldClasses, images: Images, class_n: np.ndarray, new: int, replay: Images | None
    ) -> _Scorer:
        y_nd = old.placed(images.z_nd)
        count_K = np.bincount(class_n, minlength=new)
        mean_Kd = np.stack([y_nd[class_n == k].mean(0) for k in range(new)]) if new else y_nd[:0]
        scorer = cls(count_K, mean_Kd, np.zeros((new, y_nd.shape[1] + 2)))
        if replay is None:
            return scorer
        column_Kd = _learned(
            np.concatenate([scorer.scores(old, replay), scorer.scores(old, images)]),
            np.concatenate([_inputs(old, replay), _inputs(old, images)]),
            np.concatenate([np.zeros(len(replay), np.int64), class_n + 1]),
        )
        return cls(count_K, mean_Kd, column_Kd)

    def scores(self, old: OldClasses, images: Images) -> np.ndarray:
        """[B, K]."""
        plain_BK = old.against_old(old.placed(images.z_nd), self.mean_Kd, self.count_K)
        if not self.column_Kd.any():
            return plain_BK
        return plain_BK + _dot(_inputs(old, images), self.column_Kd)


def _two_covariances(
    z_Nd: np.ndarray, labels_N: np.ndarray, count_C: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """m, axes, b and the class means in y."""
    dim, present_C = z_Nd.shape[1], count_C > 0
    classes = int(present_C.sum())
    mean_Cd = np.zeros((len(count_C), dim))
    np.add.at(mean_Cd, labels_N, z_Nd)
    mean_Cd /= np.maximum(count_C, 1)[:, None]
    inside_Nd = z_Nd - mean_Cd[labels_N]
    within_dd = inside_Nd.T @ inside_Nd / (len(z_Nd) - classes)
    within_dd += _RIDGE * max(np.trace(within_dd) / dim, 1e-12) * np.eye(dim)
    centre_d = mean_Cd[present_C].mean(0)
    apart_Cd = mean_Cd[present_C] - centre_d
    between_dd = apart_Cd.T @ apart_Cd / (classes - 1)
    unwithin_dd = np.linalg.inv(np.linalg.cholesky(within_dd))
    between_d, turn_dd = np.linalg.eigh(unwithin_dd @ between_dd @ unwithin_dd.T)
    between_d = between_d.clip(min=0)
    share = dim / (classes - 1 + dim)
    axes_dd = np.ascontiguousarray(turn_dd.T @ unwithin_dd)
    between_d = (1 - share) * between_d + share * between_d.mean()
    return centre_d, axes_dd, between_d, _dot(mean_Cd - centre_d, axes_dd)


def _inputs(old: OldClasses, images: Images) -> np.ndarray:
    """What columns see: y/√d, the log of Σ exp(l/T), and 1: [B, d + 2]."""
    y_Bd = old.placed(images.z_nd)
    energy_B1 = _log_sum(np.asarray(images.logits_nC, np.float64) / old.temperature)
    return np.concatenate([y_Bd / y_Bd.shape[1] ** 0.5, energy_B1, np.ones_like(energy_B1)], 1)


def _learned(plain_NK: np.ndarray, inputs_Nd: np.ndarray, target_N: np.ndarray) -> np.ndarray:
    """Columns [K, d + 2] by class-balanced cross-entropy over (old, new classes); old scores 0.

    With log softmax as the score of the old classes the loss over all classes differs from this one by a
    constant: only old or new, and which new, is learned.
    """
    plain, inputs = torch.from_numpy(plain_NK), torch.from_numpy(inputs_Nd)
    target = torch.from_numpy(target_N)
    count = torch.bincount(target, minlength=plain.shape[1] + 1)
    weight = (1.0 / count.clamp(min=1) / len(count))[target]
    columns = torch.zeros(plain.shape[1], inputs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [columns], max_iter=_STEPS, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = F.pad(plain + inputs @ columns.T, (1, 0))
        each = F.cross_entropy(scores, target, reduction="none")
        total = (weight * each).sum() + PENALTY * columns[:, :-1].square().sum()
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[arg-type]  # a closure may return a tensor
    return columns.detach().numpy()


def _margins(
    old: OldClasses, model: _Scorer, calibration: Images, labels_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By how much each calibration image stays old (the largest τ that it bears), and if it is right."""
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
    return float(margin_n.max()) + 1.0  # all may be lost


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
    scores_nK = model.scores(old, images)
    y_nd = old.placed(images.z_nd)
    for i, k in enumerate(class_n):
        count = model.count_K[k]
        if count < 2:
            scores_nK[i] = np.nan
            continue
        without_1d = ((count * model.mean_Kd[k] - y_nd[i]) / (count - 1))[None]
        scores_nK[i, k] = old.against_old(y_nd[i : i + 1], without_1d, np.array([count - 1]))[0, 0]
    return scores_nK


def _accuracy(scores_nK: np.ndarray, head_n: np.ndarray, class_n: np.ndarray) -> float | None:
    """Mean over classes of the % of images that are answered with their new class."""
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
        np.concatenate([part.z_nd for part in parts]),
    )


def _dot(a_Bd: np.ndarray, b_Kd: np.ndarray) -> np.ndarray:
    """A bᵀ, [B, K], each row the same bits in any company (a BLAS product promises no such thing)."""
    return np.einsum("bd,kd->bk", a_Bd, b_Kd, optimize=False)


def _log_sum(scores_BC: np.ndarray) -> np.ndarray:
    """Log Σ exp of each row, [B, 1]."""
    top_B1 = scores_BC.max(1, keepdims=True)
    return top_B1 + np.log(np.exp(scores_BC - top_B1).sum(1, keepdims=True))


def _to_json(of: OldClasses | NewClasses) -> dict[str, Any]:
    return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in vars(of).items()}


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
        if not (np.isfinite(images.z_nd).all() and images.z_nd.any(1).all()):
            raise UserError(
                f"an image of class {name} has no features",
                where=name,
                remedy="leave out images that can't be read",
            )
