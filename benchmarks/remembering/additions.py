"""New classes: rule R compared with other ways to use the same images.

Every rule sees the same images of the old classes: all on which the student was trained. (The product thins them itself
where it learns columns.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from cnn2gnn_dist.inference.calibration import fit_temperature, log_softmax, softmax
from cnn2gnn_dist.inference.memory.new_classes import NewClasses, Trade
from cnn2gnn_dist.inference.memory.old_classes import Images, OldClasses

PARTS = ("calibration", "test", "new_test")
PENALTY = 1e-3
"""On the squares of a head's weights. Ten times as much finds more new images in some data sets, and fewer old ones in
others, so both have a row; a tenth of it finds fewer new ones."""
Scores = dict[str, tuple[np.ndarray, np.ndarray]]
"""Scores by part: of the old classes [n, C] and of the new ones [n, K]."""


class Setting:
    """A data set's features, with what all rules share; ``kept`` comes from ``features.load``."""

    def __init__(self, kept: dict[str, np.ndarray]) -> None:
        self.old = int(kept["old"])
        self.new = len(kept["classes"]) - self.old
        parts = ("train", "pool", *PARTS)
        self.raw = {p: kept[f"{p}/x"] for p in parts}
        mean_D, spread_D = self.raw["train"].mean(0), self.raw["train"].std(0) + 1e-6
        self.f = {p: unit(x - mean_D) for p, x in self.raw.items()}
        self.x = {p: (x - mean_D) / spread_D for p, x in self.raw.items()}
        self.logits = {p: kept[f"{p}/logits"] for p in parts}
        self.labels = {p: kept[f"{p}/labels"] for p in parts}
        self.temperature = fit_temperature(self.logits["calibration"], self.labels["calibration"])
        self.log_p = {p: log_softmax(self.logits[p], self.temperature) for p in parts}
        self.heads: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        self.model = OldClasses.fit(
            self.raw["train"],
            self.labels["train"],
            self.images("calibration"),
            self.labels["calibration"],
        )
        self.means = np.stack(
            [self.f["train"][self.labels["train"] == c].mean(0) for c in range(self.old)]
        )

    def images(self, part: str, rows: np.ndarray | slice = slice(None)) -> Images:
        return Images(self.logits[part][rows], self.raw[part][rows])

    def draw(self, each: int, number: int) -> np.ndarray:
        """Draw rows of the pool, ``each`` of every new class."""
        rng = np.random.default_rng([each, number])
        rows = [np.flatnonzero(self.labels["pool"] == self.old + k) for k in range(self.new)]
        return np.concatenate([rng.choice(mine, each, replace=False) for mine in rows])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def ours(of: Setting, rows: np.ndarray) -> tuple[Scores, tuple[Trade, ...]]:
    """The product's rule, and its trades."""
    classes = of.labels["pool"][rows]
    entries = {str(c): of.images("pool", rows[classes == c]) for c in np.unique(classes)}
    found = NewClasses.fit(
        of.model, entries, of.images("calibration"), of.labels["calibration"],
        replay=of.images("train"),
    )  # fmt: skip
    scores = {p: found.scores(of.model, of.logits[p], of.raw[p]) for p in PARTS}
    return {
        p: (s[:, : of.old], s[:, of.old :] - found.offset) for p, s in scores.items()
    }, found.trades


def cosine_rule(of: Setting, rows: np.ndarray) -> Scores:
    """Rule R of the first measurements: log softmax over class means of 10·cos."""
    means = unit(np.concatenate([of.means, _new_means(of, of.f, rows)]))
    return {p: (of.log_p[p], log_softmax(10 * of.f[p] @ means.T)[:, of.old :]) for p in PARTS}


def prototypes(of: Setting, rows: np.ndarray) -> Scores:
    """Cosine to class means, for old classes too."""
    means = unit(np.concatenate([of.means, _new_means(of, of.f, rows)]))
    return {p: (s[:, : of.old], s[:, of.old :]) for p in PARTS for s in [of.f[p] @ means.T]}


def imprinting(of: Setting, rows: np.ndarray) -> Scores:
    """Weight imprinting (Qi, Brown, Lowe, CVPR 2018): the mean, scaled to the old weights' length, as weights."""
    weights, bias = _old_head(of)
    length = np.linalg.norm(weights, axis=0).mean()
    new = length * unit(_new_means(of, of.x, rows)).T
    return {p: (of.x[p] @ weights + bias, of.x[p] @ new + bias.mean()) for p in PARTS}


def knn_lm(of: Setting, rows: np.ndarray, k: int = 10, share: float = 0.25) -> Scores:
    """Softmax and the neighbors' vote mixed (Khandelwal et al., ICLR 2020)."""
    if not hasattr(of, "near"):
        of.near = {p: nearest(of.f[p], of.f["train"], k) for p in PARTS}
    labels = np.concatenate([of.labels["train"], of.labels["pool"][rows]])
    scores = {}
    for p in PARTS:
        old_near, old_cos = of.near[p]
        new_cos = of.f[p] @ of.f["pool"][rows].T
        new_near = np.broadcast_to(len(of.labels["train"]) + np.arange(len(rows)), new_cos.shape)
        cos = np.concatenate([old_cos, new_cos], 1)
        best = np.argpartition(-cos, k, axis=1)[:, :k]
        near = np.take_along_axis(np.concatenate([old_near, new_near], 1), best, 1)
        weight = softmax(10 * np.take_along_axis(cos, best, 1))
        vote = np.zeros((len(cos), of.old + of.new))
        np.add.at(vote, (np.arange(len(cos))[:, None], labels[near]), weight)
        mixed = share * vote
        mixed[:, : of.old] += (1 - share) * np.exp(of.log_p[p])
        scores[p] = mixed[:, : of.old], mixed[:, of.old :]
    return scores


def retrained(of: Setting, rows: np.ndarray, penalty: float = PENALTY) -> Scores:
    """A linear head over all classes: class-balanced cross-entropy on x.

    The loss is convex, so that starting from the old classes' own head changes only how soon it is fitted.
    """
    weights, bias = _old_head(of, penalty)
    start = np.pad(weights, ((0, 0), (0, of.new))), np.pad(bias, (0, of.new))
    weights, bias = fit_head(*_with_old(of, rows), None, of.old + of.new, start, penalty)
    scores = {p: of.x[p] @ weights + bias for p in PARTS}
    return {p: (s[:, : of.old], s[:, of.old :]) for p, s in scores.items()}


def columns(of: Setting, rows: np.ndarray) -> Scores:
    """The new columns alone, next to the head's logits."""
    logits = np.concatenate([of.logits["train"], of.logits["pool"][rows]])
    weights, bias = fit_head(*_with_old(of, rows), logits, of.new)
    return {p: (of.logits[p], of.x[p] @ weights + bias) for p in PARTS}


RIVALS: dict[str, Callable[[Setting, np.ndarray], Scores]] = {
    "rule R, cosines": cosine_rule,
    "head retrained": retrained,
    "head retrained, larger penalty": partial(retrained, penalty=10 * PENALTY),
    "its new columns": columns,
    "prototypes": prototypes,
    "imprinting": imprinting,
    "k-NN-LM": knn_lm,
}
UNCALIBRATED = ("prototypes", "imprinting", "k-NN-LM")
KEEPS_HEAD = ("rule R, cosines", "its new columns", "k-NN-LM")
"""Rules that answer old classes as the head does: what they may lose counts from its accuracy."""


def judged(of: Setting, scores: Scores, old_loss: float | None, *, own: bool) -> list[float]:
    """Old and new accuracy, their harmonic mean, AUROC of old against new; all in %.

    Args:
        of: the setting.
        scores: those of a rule.
        old_loss: points that the offset may cost on calibration images; None: no offset.
        own: points count from the rule's own accuracy on the old classes, not from the head's.
    """
    labels = of.labels["calibration"]
    offset = 0.0
    if old_loss is not None:
        old, new = scores["calibration"]
        right = old.argmax(1) == labels
        margins = np.sort((old.max(1) - new.max(1))[right])
        head = of.logits["calibration"].argmax(1) == labels
        spare = 0 if own else int(right.sum()) - int(head.sum())
        turned = max(0, int(old_loss * len(labels) / 100 + 1e-9) + spare)
        offset = margins[min(turned, len(margins) - 1)]
    old, new = scores["test"]
    stays = old.max(1) >= new.max(1) + offset
    old_right = (stays & (old.argmax(1) == of.labels["test"])).mean()
    margin = [new.max(1) - old.max(1)]
    old, new = scores["new_test"]
    found = old.max(1) < new.max(1) + offset
    new_right = (found & (new.argmax(1) + of.old == of.labels["new_test"])).mean()
    margin.append(new.max(1) - old.max(1))
    auroc = roc_auc_score(np.repeat([0, 1], [len(m) for m in margin]), np.concatenate(margin))
    mean = 2 * old_right * new_right / max(old_right + new_right, 1e-12)
    return [100 * float(v) for v in (old_right, new_right, mean, auroc)]


def nearest(f: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the bank nearest to each row of f, and their cosines, [n, k] each."""
    found = []
    for some in np.array_split(f, max(1, len(f) // 500)):
        cos = some @ bank.T
        near = np.argpartition(-cos, k, axis=1)[:, :k]
        found.append((near, np.take_along_axis(cos, near, 1)))
    return np.concatenate([n for n, _ in found]), np.concatenate([c for _, c in found])


def _new_means(of: Setting, features: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    classes = of.labels["pool"][rows]
    return np.stack([features["pool"][rows[classes == c]].mean(0) for c in np.unique(classes)])


def _with_old(of: Setting, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels: those of all old training images, and of the new ones."""
    x = np.concatenate([of.x["train"], of.x["pool"][rows]])
    return x, np.concatenate([of.labels["train"], of.labels["pool"][rows]])


def _old_head(of: Setting, penalty: float = PENALTY) -> tuple[np.ndarray, np.ndarray]:
    if penalty not in of.heads:
        of.heads[penalty] = fit_head(of.x["train"], of.labels["train"], None, of.old, None, penalty)
    return of.heads[penalty]


def fit_head(
    x: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray | None,
    width: int,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    penalty: float = PENALTY,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit weights [D, width] and bias by class-balanced cross-entropy, next to fixed logits if given.

    ``start``: the weights and the bias to start from; None: zeros.
    """
    inputs, target = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)
    count = torch.bincount(target)
    weight = (1.0 / count.clamp(min=1) / (count > 0).sum())[target]
    first = start or (np.zeros((x.shape[1], width)), np.zeros(width))
    weights, bias = (torch.tensor(one, dtype=torch.float32).requires_grad_() for one in first)
    fixed = None if logits is None else torch.from_numpy(logits)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = inputs @ weights + bias
        scores = scores if fixed is None else torch.cat([fixed, scores], 1)
        each = torch.nn.functional.cross_entropy(scores, target, reduction="none")
        total = (weight * each).sum() + penalty * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach().numpy(), bias.detach().numpy()


def share(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """The ratio of two means in %, and 1.96 of its standard errors, from pairs (the same draw); NaN of nothing."""
    mine, other = np.array(ours), np.array(theirs)
    if not other.any():
        return np.nan, np.nan
    ratio = mine.mean() / other.mean()
    # To first order: the spread of what is left of each pair, on the scale of the ratio.
    left = (mine - ratio * other) / other.mean()
    error = 1.96 * left.std(ddof=1) / len(left) ** 0.5 if len(left) > 1 else np.nan
    return 100 * float(ratio), 100 * float(error)
