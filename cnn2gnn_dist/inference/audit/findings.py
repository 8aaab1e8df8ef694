"""Audit a training set by its graph: all findings of ``scores.py`` over one set, in blocks.

Shapes as in ``scores.py``: N images, C classes, D features, d dimensions of z, M candidates, k neighbors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.audit import look_alike
from cnn2gnn_dist.inference.audit import scores as audit_scores
from cnn2gnn_dist.inference.audit.linear_head import fit_head
from cnn2gnn_dist.inference.audit.scores import Bleeding, LabelScores, Pairs

ROWS, CELLS = 8192, 1 << 24
LEAST = 20
"""Images below which a set has no useful statistics."""
FIRST, MOST_PAIRS, CHANCE = 4, 50_000, 5_000
"""Nearest neighbors of each image that are proposed as near-duplicates; proposed pairs; pairs that show
how similar images are by chance."""
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
Look = Callable[[np.ndarray], np.ndarray]
"""Rows [n] → thumbnails uint8 [n, 32, 32, 3]; gray where there is none."""


@dataclass(frozen=True)
class TrainingSet:
    """The training set to audit.

    Attributes:
        x_ND: float16 or float32, the student's features.
        z_Nd: float32, of unit length; rows of zeros are images that could not be read.
        labels_N: int32.
        table_NM: int32, the candidates of each image; -1: none.
        twin_N: int32, the smallest id among the copies of an image; None: unknown.
        classes: names of the C classes.
    """

    x_ND: np.ndarray
    z_Nd: np.ndarray
    labels_N: np.ndarray
    table_NM: np.ndarray
    twin_N: np.ndarray | None
    classes: Sequence[str]


@dataclass(frozen=True)
class HeldOut:
    """Held-out images, embedded by the same student; rows of zeros in ``z_Qd`` could not be read."""

    x_QD: np.ndarray
    z_Qd: np.ndarray
    labels_Q: np.ndarray


@dataclass(frozen=True)
class Findings:
    """The findings.

    Attributes:
        ids_Nk, far_Nk, weight_Nk: neighbors without twins, squared distances in z, weights.
        labels: one entry per image; unreadable ones have the score -inf.
        twins_P2: int64 [P, 2], pairs of exact twins: the first of a group, and each of the others.
        within: near-duplicates among the training images, exact twins left out.
        across: between held-out (a) and training images (b), exact ones included; None: not searched.
        reach_N, rank_N: distance to the farthest neighbor (inf: none); share of images nearer to theirs.
        degree_N, same_N: in-degree; share of it from the same class.
        bleeding: pairs of classes.
    """

    ids_Nk: np.ndarray
    far_Nk: np.ndarray
    weight_Nk: np.ndarray
    labels: LabelScores
    twins_P2: np.ndarray
    within: Pairs
    across: Pairs | None
    reach_N: np.ndarray
    rank_N: np.ndarray
    degree_N: np.ndarray
    same_N: np.ndarray
    bleeding: Bleeding

    def doubtful(self, labels_N: np.ndarray) -> np.ndarray:
        """Images for which another class fits better, most doubtful first."""
        rows = np.flatnonzero(
            (self.labels.suggested_N != labels_N) & np.isfinite(self.labels.score_N)
        )
        return rows[np.lexsort((rows, -self.labels.score_N[rows]))]


def audit(
    given: TrainingSet,
    held: HeldOut | None,
    *,
    look: Look | None = None,
    look_held: Look | None = None,
    progress: Progress = lambda rows, _: rows,
) -> Findings:
    """Audit a training set.

    Args:
        given: the training images.
        held: held-out images, to find those that are also among the training images.
        look: pictures of training images, to confirm near-duplicates; None: features alone decide.
        look_held: pictures of held-out images.
        progress: wraps an iterable; shows its progress.

    Raises:
        UserError: fewer than ``LEAST`` readable images, or a single class.
    """
    readable_N = np.zeros(len(given.z_Nd), bool)
    for rows in _blocks(len(readable_N)):
        readable_N[rows] = np.any(given.z_Nd[rows], axis=1)
    labels_N = np.where(readable_N, given.labels_N, -1)
    if readable_N.sum() < LEAST or len(np.unique(labels_N[labels_N >= 0])) < 2:
        raise UserError(
            f"{int(readable_N.sum())} readable images of "
            f"{len(np.unique(labels_N[labels_N >= 0]))} classes are too few to audit",
            remedy=f"at least {LEAST} images of 2 classes",
        )
    k = given.table_NM.shape[1]
    ids, far = audit_scores.table_neighbours(given.z_Nd, given.table_NM, k, given.twin_N)
    weight = audit_scores.vote_weights(far)
    degree, same = audit_scores.hubs(ids, labels_N)
    reach, rank = audit_scores.outliers(far)
    return Findings(
        ids,
        far,
        weight,
        _labels(given, labels_N, ids, weight, progress),
        _twins(given.twin_N, readable_N),
        _within(given, ids, look),
        None if held is None else _across(given, held, k, look_held, look, progress),
        reach,
        rank,
        degree,
        same,
        audit_scores.bleeding(ids, weight, labels_N, len(given.classes)),
    )


def _labels(
    given: TrainingSet,
    labels_N: np.ndarray,
    ids_Nk: np.ndarray,
    weight_Nk: np.ndarray,
    progress: Progress,
) -> LabelScores:
    classes = len(given.classes)
    head = fit_head(given.x_ND, labels_N, classes)

    def head_of(ids: np.ndarray) -> np.ndarray:
        return head.probabilities(given.x_ND[ids])

    parts = []
    for rows in progress(_blocks(len(labels_N), max(min(ROWS, CELLS // classes), 1)), "labels"):
        y, ids, weight = labels_N[rows].clip(min=0), ids_Nk[rows], weight_Nk[rows]
        votes = audit_scores.vote(ids, weight, labels_N, classes)
        # Half by the neighbors' labels, half by the head's probabilities for them: with many wrong labels
        # the labels alone find less than the head (docs/audit.md).
        mixed = (votes + audit_scores.soft_vote(ids, weight, head_of, classes)) / 2
        one = audit_scores.label_scores(head.probabilities(given.x_ND[rows]), mixed, y)
        parts.append(one._replace(agree_N=one.agree_N & (votes.argmax(1) == one.suggested_N)))
    found = LabelScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    found.score_N[labels_N < 0] = -np.inf
    found.agree_N[labels_N < 0] = False
    return found


def _twins(twin_N: np.ndarray | None, readable_N: np.ndarray) -> np.ndarray:
    if twin_N is None:
        return np.empty((0, 2), np.int64)
    others = np.flatnonzero((twin_N != np.arange(len(twin_N))) & readable_N)
    return np.stack([twin_N[others].astype(np.int64), others], axis=1)


def _within(given: TrainingSet, ids_Nk: np.ndarray, look: Look | None) -> Pairs:
    """Near-duplicates among the neighbors in z, by distances of the features x, which contain more than the class."""
    center_D = _center(given.x_ND)
    far_Nk = np.full(ids_Nk.shape, np.inf, np.float32)
    for rows in _blocks(len(ids_Nk)):
        own, other = _unit(given.x_ND[rows], center_D), given.x_ND[ids_Nk[rows].clip(min=0)]
        far = 2 - 2 * np.einsum("bd,bkd->bk", own, _unit(other, center_D))
        far_Nk[rows] = np.where(ids_Nk[rows] >= 0, np.maximum(far, 0), np.inf)
    return _confirmed(*_sorted(ids_Nk, far_Nk), True, look, look)


def _across(
    given: TrainingSet,
    held: HeldOut,
    k: int,
    look_held: Look | None,
    look: Look | None,
    progress: Progress,
) -> Pairs:
    """The same between held-out and training images."""
    center_D = _center(given.x_ND)
    ids_Qk = np.full((len(held.z_Qd), k), -1, np.int64)
    far_Qk = np.full(ids_Qk.shape, np.inf, np.float32)
    search = audit_scores.Nearest(given.z_Nd)
    for rows in progress(_blocks(len(ids_Qk), 1024), "held-out"):
        ids, _ = search(held.z_Qd[rows], k)
        own, other = _unit(held.x_QD[rows], center_D), given.x_ND[ids.clip(min=0)]
        far = 2 - 2 * np.einsum("bd,bkd->bk", own, _unit(other, center_D))
        ids_Qk[rows], far_Qk[rows] = ids, np.where(ids >= 0, np.maximum(far, 0), np.inf)
    return _confirmed(*_sorted(ids_Qk, far_Qk), False, look_held, look)


def _confirmed(
    ids_Nk: np.ndarray, far_Nk: np.ndarray, within: bool, look_a: Look | None, look_b: Look | None
) -> Pairs:
    """Pairs that features propose and pixels confirm; by features alone where there are no pictures."""
    if look_a is None or look_b is None:
        return audit_scores.near_duplicates(ids_Nk, far_Nk, within=within)
    found = audit_scores.proposals(ids_Nk, far_Nk, within=within, first=FIRST, most=MOST_PAIRS)
    # Images and their last neighbors: as similar as different pictures get.
    rows = np.flatnonzero(ids_Nk[:, -1] >= 0)
    rows = np.random.default_rng(0).permutation(rows)[:CHANCE]
    chance = _likeness(look_a, look_b, rows, ids_Nk[rows, -1])
    pixels = _likeness(look_a, look_b, found.a_P, found.b_P)
    limit = look_alike.threshold(pixels, chance)
    kept = np.flatnonzero(pixels >= limit)
    kept = kept[np.lexsort((kept, -pixels[kept]))]
    return Pairs(
        found.a_P[kept],
        found.b_P[kept],
        found.cosine_P[kept],
        found.ratio_P[kept],
        pixels[kept],
        limit,
    )


def _likeness(look_a: Look, look_b: Look, a_P: np.ndarray, b_P: np.ndarray) -> np.ndarray:
    """The likeness of each pair; each picture is read once, not once per pair."""
    (a, at_a), (b, at_b) = (np.unique(rows, return_inverse=True) for rows in (a_P, b_P))
    pictures_a, pictures_b = look_a(a), look_b(b)
    found = np.empty(len(a_P), np.float32)
    for rows in _blocks(len(found), 4096):
        found[rows] = look_alike.likeness(pictures_a[at_a[rows]], pictures_b[at_b[rows]])
    return found


def _blocks(count: int, size: int = ROWS) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _center(x_ND: np.ndarray) -> np.ndarray:
    total = np.zeros(x_ND.shape[1], np.float64)
    for rows in _blocks(len(x_ND)):
        total += np.asarray(x_ND[rows], np.float32).sum(0)
    return (total / max(len(x_ND), 1)).astype(np.float32)


def _unit(x: np.ndarray, center_D: np.ndarray) -> np.ndarray:
    centered = np.asarray(x, np.float32) - center_D
    return centered / np.maximum(np.linalg.norm(centered, axis=-1, keepdims=True), 1e-12)


def _sorted(ids_Nk: np.ndarray, far_Nk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(far_Nk, axis=1, kind="stable")
    return np.take_along_axis(ids_Nk, order, 1), np.take_along_axis(far_Nk, order, 1)
