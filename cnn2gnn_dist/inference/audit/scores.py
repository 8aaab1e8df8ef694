"""What a training set's own graph shows: label errors, near-duplicates, outliers, hubs, bleeding.

Pure: arrays in, arrays out. Nothing is computed for all pairs; pairs come from k nearest neighbors.

Shapes: N images, C classes, D features, d dimensions of z (unit length), k neighbors, P pairs, Q queries.
A neighbor's id of -1 means none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cnn2gnn_dist.graph.search.knn import Index
from cnn2gnn_dist.models.graph_head import adaptive_neighbours

HEAD_FLOOR, VOTE_FLOOR, OF_BEST = 0.001, 0.02, 1 / 3
"""Added to the probabilities in the score, so that neither alone can decide it."""
ROWS, CELLS = 8192, 1 << 23
"""Most rows of a block, and most values of one with a column per class and neighbor: they bound memory."""
FALSE_PAIRS = 0.01
"""Expected share of pairs below the threshold that are close by chance, not near-duplicates."""


class LabelScores(NamedTuple):
    """How doubtful the label of each image is.

    Attributes:
        score_N: float32, cost(y) − ⅓ min_c cost(c), cost(c) = −log(p_head(c) + .001) − log(vote(c) + .02):
            higher is more doubtful. The second term: an image that fits no class is not a label error.
        suggested_N: int32, the class of the lowest cost; the label itself if nothing is better.
        margin_N: float32, mean probability of head and vote for the best other class minus that for
            the label. It ranks flips between two similar classes better, all others worse.
        head_N, vote_N: float32, probability of the label by the head and by the neighbors.
        agree_N: bool, head and neighbors both rank the suggested class first, and it differs from the label.
    """

    score_N: np.ndarray
    suggested_N: np.ndarray
    margin_N: np.ndarray
    head_N: np.ndarray
    vote_N: np.ndarray
    agree_N: np.ndarray


class Pairs(NamedTuple):
    """Pairs of nearly identical images, closest first.

    Attributes:
        a_P, b_P: int64; within one set a < b, between two sets a of the queries, b of the base.
        cosine_P: float32.
        ratio_P: float32, their distance divided by the distance to the k-th neighbor (the smaller of
            both sides within a set).
        pixels_P: float32, likeness of the pixels (``look_alike``); nan where they were not compared.
        threshold: the ratio up to which a pair counts, or the likeness from which it does.
    """

    a_P: np.ndarray
    b_P: np.ndarray
    cosine_P: np.ndarray
    ratio_P: np.ndarray
    pixels_P: np.ndarray
    threshold: float


class Bleeding(NamedTuple):
    """Vote mass between pairs of classes, most first.

    Attributes:
        a_P, b_P: int32, a < b.
        mass_P: float32, mean of both directions.
        a_to_b_P, b_to_a_P: float32, share of the votes that images of one class get from the other.
    """

    a_P: np.ndarray
    b_P: np.ndarray
    mass_P: np.ndarray
    a_to_b_P: np.ndarray
    b_to_a_P: np.ndarray


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows centered and scaled to unit length, float32: features with meaningful inner products."""
    x_ND = np.asarray(x_ND, np.float32)
    x_ND = x_ND - x_ND.mean(0)
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)


def neighbours(
    z_Nd: np.ndarray, k: int, twin_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other images of each, exactly: ids [N, k] int64 and squared distances [N, k] float32.

    The image itself and its twins (equal number in ``twin_N``) are left out. Rows of zeros are images
    that could not be read: they have no neighbors and are never neighbors. Missing ones are -1 and inf.
    """
    count, there = len(z_Nd), np.flatnonzero(np.any(z_Nd, axis=1))
    ids_Nk = np.full((count, k), -1, np.int64)
    far_Nk = np.full((count, k), np.inf, np.float32)
    if len(there) < 2:
        return ids_Nk, far_Nk
    spare = 0
    if twin_N is not None:
        spare = int(np.bincount(twin_N[there]).max()) - 1
    index = Index(np.asarray(z_Nd, np.float32)[there])
    fetch = min(k + spare, len(there) - 1)
    for start in range(0, len(there), ROWS):
        own = np.arange(start, min(start + ROWS, len(there)))
        found, near = index.search(index.base_Nd[own], fetch, exclude=own)
        rows, ids = there[own], there[found]
        if twin_N is not None:
            same = twin_N[ids] == twin_N[rows, None]
            ids, near = _moved_up(np.where(same, -1, ids), np.where(same, -np.inf, near))
        width = min(k, fetch)
        ids_Nk[rows, :width] = ids[:, :width]
        far_Nk[rows, :width] = np.maximum(2 - 2 * near[:, :width], 0)
    return ids_Nk, far_Nk


def table_neighbours(
    z_Nd: np.ndarray, table_NM: np.ndarray, k: int, twin_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`neighbours`, from a candidate table: the k nearest of each image's M candidates."""
    count = len(z_Nd)
    ids_Nk = np.full((count, k), -1, np.int64)
    far_Nk = np.full((count, k), np.inf, np.float32)
    for start in range(0, count, ROWS):
        rows = np.arange(start, min(start + ROWS, count))
        ids = np.asarray(table_NM[rows], np.int64)
        z_Bd, c_BMd = (np.asarray(z_Nd[i], np.float32) for i in (rows, np.maximum(ids, 0)))
        gone = (
            (ids < 0) | (ids == rows[:, None]) | ~np.any(z_Bd, 1, keepdims=True) | ~np.any(c_BMd, 2)
        )
        if twin_N is not None:
            gone |= twin_N[np.maximum(ids, 0)] == twin_N[rows, None]
        near = np.where(gone, -np.inf, np.einsum("bmd,bd->bm", c_BMd, z_Bd))
        ids, near = _moved_up(np.where(gone, -1, ids), near)
        width = min(k, ids.shape[1])
        ids_Nk[rows, :width] = ids[:, :width]
        far_Nk[rows, :width] = np.maximum(2 - 2 * near[:, :width], 0)
    return ids_Nk, far_Nk


class Nearest:
    """Search in a set of images; rows of zeros are never neighbors."""

    def __init__(self, base_Nd: np.ndarray) -> None:
        self._there = np.flatnonzero(np.any(base_Nd, axis=1))
        self._index = Index(np.asarray(base_Nd, np.float32)[self._there])

    def __call__(self, query_Qd: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each query: ids [Q, k] and squared distances [Q, k]; -1 and inf if fewer.

        A query of zeros, an image that could not be read, has none.
        """
        ids_Qk = np.full((len(query_Qd), k), -1, np.int64)
        far_Qk = np.full((len(query_Qd), k), np.inf, np.float32)
        asked, width = np.flatnonzero(np.any(query_Qd, axis=1)), min(k, len(self._there))
        if width and len(asked):
            found, near = self._index.search(np.asarray(query_Qd, np.float32)[asked], width)
            ids_Qk[asked, :width] = self._there[found]
            far_Qk[asked, :width] = np.maximum(2 - 2 * near, 0)
        return ids_Qk, far_Qk


def _moved_up(ids_BM: np.ndarray, near_BM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By descending similarity, ties by ascending id, missing ones last."""
    key = np.where(ids_BM < 0, np.iinfo(np.int64).max, ids_BM)
    order = np.lexsort((key, -near_BM), axis=1)
    return np.take_along_axis(ids_BM, order, 1), np.take_along_axis(near_BM, order, 1)


def vote_weights(far_Nk: np.ndarray) -> np.ndarray:
    """Adaptive-neighbor weights [N, k] float32 of squared distances (inf: none).

    The last column is the border, of weight 0, unless fewer are there. Rows sum to 1, or to 0 without
    a neighbor.
    """
    weight_Nk = np.zeros(far_Nk.shape, np.float32)
    for start in range(0, len(far_Nk), ROWS):
        far = torch.from_numpy(np.asarray(far_Nk[start : start + ROWS], np.float32))
        found = adaptive_neighbours(far, max(far.shape[1] - 1, 1), torch.isfinite(far))
        weight_Nk[start : start + ROWS] = found.p_BM.numpy()
    return weight_Nk


def vote(
    ids_Nk: np.ndarray, weight_Nk: np.ndarray, labels_N: np.ndarray, classes: int
) -> np.ndarray:
    """Weights summed by class, [rows, C] float32; uniform for rows without neighbors.

    ``labels_N`` belongs to the neighbors' ids, so ``ids_Nk`` may be some of the rows.
    """
    rows, columns = np.nonzero(ids_Nk >= 0)
    found = labels_N[ids_Nk[rows, columns]].astype(np.int64)
    there, weight = found >= 0, weight_Nk[rows, columns]
    cells = rows[there] * classes + found[there]
    flat = np.bincount(cells, weight[there], minlength=len(ids_Nk) * classes)
    mass_NC = flat.reshape(len(ids_Nk), classes).astype(np.float32)
    total_N = mass_NC.sum(1, keepdims=True)
    return np.where(total_N > 0, mass_NC / np.maximum(total_N, 1e-12), np.float32(1 / classes))


def soft_vote(
    ids_Nk: np.ndarray,
    weight_Nk: np.ndarray,
    head_of: Callable[[np.ndarray], np.ndarray],
    classes: int,
) -> np.ndarray:
    """The same with a head's probabilities for the neighbors in place of their labels, [rows, C] float32.

    Wrong labels of neighbors are outvoted twice: in the head, and here. ``head_of`` maps ids [n] to
    probabilities [n, C].
    """
    found_NC = np.full((len(ids_Nk), classes), np.float32(1 / classes))
    for start in range(0, len(ids_Nk), max(CELLS // (ids_Nk.shape[1] * classes), 1)):
        rows = slice(start, start + max(CELLS // (ids_Nk.shape[1] * classes), 1))
        ids, weight = ids_Nk[rows], np.where(ids_Nk[rows] >= 0, weight_Nk[rows], 0)
        some, place = np.unique(ids.clip(min=0), return_inverse=True)
        said = np.einsum("bk,bkc->bc", weight, head_of(some)[place.reshape(ids.shape)])
        there = weight.sum(1) > 0
        found_NC[rows][there] = said[there] / weight.sum(1, keepdims=True)[there]
    return found_NC


def label_scores(head_NC: np.ndarray, vote_NC: np.ndarray, labels_N: np.ndarray) -> LabelScores:
    """Combine a head's probabilities and the neighbors' vote; both [N, C], each image left out of its own vote."""
    rows = np.arange(len(labels_N))
    cost_NC = -np.log(head_NC + HEAD_FLOOR) - np.log(vote_NC + VOTE_FLOOR)
    given_N, suggested_N = cost_NC[rows, labels_N], cost_NC.argmin(1)
    least_N = cost_NC[rows, suggested_N]
    suggested_N = np.where(least_N < given_N, suggested_N, labels_N).astype(np.int32)
    first_N = (head_NC.argmax(1) == suggested_N) & (vote_NC.argmax(1) == suggested_N)
    mean_NC = (head_NC + vote_NC) / 2
    own_N = mean_NC[rows, labels_N]
    mean_NC[rows, labels_N] = -np.inf
    return LabelScores(
        (given_N - OF_BEST * least_N).astype(np.float32),
        suggested_N,
        (mean_NC.max(1) - own_N).astype(np.float32),
        head_NC[rows, labels_N].astype(np.float32),
        vote_NC[rows, labels_N].astype(np.float32),
        first_N & (suggested_N != labels_N),
    )


def near_duplicates(
    ids_Nk: np.ndarray, far_Nk: np.ndarray, *, within: bool = True, threshold: float | None = None
) -> Pairs:
    """Pairs much closer than the nearest of k neighbors would be by chance, by features alone.

    Without near-duplicates, the neighbors of an image fill the ball that reaches to the k-th evenly:
    with intrinsic dimension m, a ratio r of distances is below t for a share of about
    (k − 1) tᵐ of the nearest ones. The threshold is the largest t at which this expectation is at
    most ``FALSE_PAIRS`` of the pairs found below it.

    Args:
        ids_Nk: int64, the neighbors of each image, nearest first.
        far_Nk: float32, squared distances.
        within: the ids are images of the same set, and a pair may be found from both sides.
        threshold: use this ratio instead of computing one.
    """
    if threshold is None:
        ratio_Nk, m = _ratios(ids_Nk, far_Nk), intrinsic_dimension(np.sqrt(far_Nk))
        threshold = _threshold(ratio_Nk[:, 0], ids_Nk.shape[1], m)
    return _pairs(ids_Nk, far_Nk, within, threshold)


def proposals(
    ids_Nk: np.ndarray, far_Nk: np.ndarray, *, within: bool = True, first: int, most: int
) -> Pairs:
    """The ``first`` nearest of each image, as pairs to be confirmed by their pixels; the ``most`` closest."""
    whole = _ratios(ids_Nk, far_Nk)[:, :first]
    values = np.sort(whole[np.isfinite(whole)])
    sides = 2 * most if within else most  # a pair may be found from both sides
    limit = float(values[min(sides, len(values)) - 1]) if len(values) else 0.0
    found = _pairs(ids_Nk, far_Nk, within, limit, first)
    return Pairs(
        found.a_P[:most], found.b_P[:most], found.cosine_P[:most], found.ratio_P[:most],
        found.pixels_P[:most], limit,
    )  # fmt: skip


def _ratios(ids_Nk: np.ndarray, far_Nk: np.ndarray) -> np.ndarray:
    far_Nk = np.sqrt(far_Nk)
    border_N = _border(far_Nk)
    ratio_Nk = np.where(ids_Nk >= 0, far_Nk / np.maximum(border_N, 1e-12)[:, None], np.inf)
    ratio_Nk[border_N <= 0] = np.inf
    return ratio_Nk


def _pairs(
    ids_Nk: np.ndarray, far_Nk: np.ndarray, within: bool, limit: float, first: int | None = None
) -> Pairs:
    """The pairs up to a ratio, each once, closest first."""
    ratio_Nk = _ratios(ids_Nk, far_Nk)[:, :first]
    rows, columns = np.nonzero(ratio_Nk <= limit)
    a, b, ratio = rows.astype(np.int64), ids_Nk[rows, columns], ratio_Nk[rows, columns]
    cosine = 1 - far_Nk[rows, columns] / 2
    if within:
        a, b = np.minimum(a, b), np.maximum(a, b)
    order = np.lexsort((b, a, ratio))
    a, b, ratio, cosine = a[order], b[order], ratio[order], cosine[order]
    _, kept = np.unique(np.stack([a, b]), axis=1, return_index=True)
    kept.sort()
    nothing = np.full(len(kept), np.nan, np.float32)
    return Pairs(
        a[kept],
        b[kept],
        cosine[kept].astype(np.float32),
        ratio[kept].astype(np.float32),
        nothing,
        limit,
    )


def intrinsic_dimension(far_Nk: np.ndarray) -> float:
    """Median over images of the maximum-likelihood estimate (Levina and Bickel, NIPS 2004).

    ``far_Nk``: distances (not squared) to the neighbors, nearest first; inf: none. The median is robust
    to near-duplicates in some rows. 1 where no row has neighbors at different distances.
    """
    border_N = _border(far_Nk)
    good = np.isfinite(far_Nk) & (far_Nk > 0)
    logs = np.log(np.where(good, border_N[:, None], 1) / np.where(good, far_Nk, 1))
    used_N, sum_N = good.sum(1), logs.sum(1)
    fair = (used_N >= 3) & (sum_N > 0)
    if not fair.any():
        return 1.0
    # k − 2 in place of k − 1 makes it unbiased (MacKay and Ghahramani, 2005).
    return max(float(np.median((used_N[fair] - 2) / sum_N[fair])), 1.0)


def _border(far_Nk: np.ndarray) -> np.ndarray:
    """The distance to the farthest neighbor of each image; 0 without any."""
    return np.where(np.isfinite(far_Nk), far_Nk, 0).max(1, initial=0)


def _threshold(first_N: np.ndarray, k: int, m: float) -> float:
    """The largest ratio at which chance explains at most ``FALSE_PAIRS`` of the pairs below it; 0 if none."""
    ratio = np.sort(first_N[np.isfinite(first_N)])
    by_chance = len(ratio) * -np.expm1((k - 1) * np.log1p(-(np.minimum(ratio, 1 - 1e-9) ** m)))
    allowed = FALSE_PAIRS * np.arange(1, len(ratio) + 1)
    good = np.flatnonzero(by_chance <= allowed)
    return float(ratio[good[-1]]) if len(good) else 0.0


def outliers(far_Nk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the farthest of up to k neighbors, and the share of images nearer than that, [N] float32.

    Images with twins have fewer neighbors. inf and 1 for those without any.
    """
    border_N = _border(np.sqrt(far_Nk)).astype(np.float32)
    reach_N = np.where(np.isfinite(far_Nk).any(1), border_N, np.float32(np.inf))
    rank_N = np.searchsorted(np.sort(reach_N), reach_N, side="left")
    return reach_N, (rank_N / max(len(reach_N) - 1, 1)).astype(np.float32)


def hubs(ids_Nk: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In-degree int64 [N], and the share of it that comes from images of the same class (nan for 0)."""
    rows, columns = np.nonzero(ids_Nk >= 0)
    to = ids_Nk[rows, columns]
    degree_N = np.bincount(to, minlength=len(labels_N))
    same_N = np.bincount(to[labels_N[to] == labels_N[rows]], minlength=len(labels_N))
    with np.errstate(invalid="ignore"):
        return degree_N, (same_N / np.where(degree_N, degree_N, np.nan)).astype(np.float32)


def bleeding(
    ids_Nk: np.ndarray, weight_Nk: np.ndarray, labels_N: np.ndarray, classes: int
) -> Bleeding:
    """Pairs of classes by the share of votes that they get from each other; only those with any."""
    rows, columns = np.nonzero((ids_Nk >= 0) & (weight_Nk > 0))
    source, target = labels_N[rows].astype(np.int64), labels_N[ids_Nk[rows, columns]]
    weight = weight_Nk[rows, columns].astype(np.float64)
    there = (source >= 0) & (target >= 0)
    source, target, weight = source[there], target[there], weight[there]
    total_C = np.bincount(source, weight, minlength=classes)
    other = source != target
    # As a list of pairs: a matrix of 20,000 classes takes gigabytes.
    flat, place = np.unique(source[other] * classes + target[other], return_inverse=True)
    share = np.bincount(place, weight[other], minlength=len(flat)) / total_C[flat // classes]
    low, high = (
        np.minimum(flat // classes, flat % classes),
        np.maximum(flat // classes, flat % classes),
    )
    pair, at = np.unique(low * classes + high, return_inverse=True)
    up = flat // classes < flat % classes
    a_to_b = np.bincount(at[up], share[up], minlength=len(pair))
    b_to_a = np.bincount(at[~up], share[~up], minlength=len(pair))
    mass = (a_to_b + b_to_a) / 2
    order = np.argsort(-mass, kind="stable")
    columns_of = (pair // classes, pair % classes, mass, a_to_b, b_to_a)
    kinds = (np.int32, np.int32, np.float32, np.float32, np.float32)
    return Bleeding(*(c[order].astype(k) for c, k in zip(columns_of, kinds, strict=True)))
