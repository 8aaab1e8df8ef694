"""Coarse lists of similar nodes, and batched scans of a few of them for many queries.

A query probes the lists with the nearest centroids, as an inverted file (IVF) does. The loops
are swapped: all queries of a unit that probe a list meet its members in one matrix product,
which is several times faster than one query after the other.
"""

from __future__ import annotations

import numpy as np

from cnn2gnn_dist.graph.search.nn_descent import ids_of, sort_keys

SAMPLE_PER_LIST = 50
SEED = 1234


def number_of_lists(nodes: int) -> int:
    """Building the lists costs as much as scanning them when both grow with the square root of the nodes."""
    return max(1, int(1.8 * nodes**0.5))


def train(z_Nd: np.ndarray, lists: int) -> np.ndarray:
    """float32 [L, d] centroids of a seeded sample; similar ones next to each other."""
    import faiss

    rng = np.random.default_rng(SEED)
    take = min(len(z_Nd), lists * SAMPLE_PER_LIST)
    sample = np.sort(rng.choice(len(z_Nd), take, replace=False))
    centroids = _kmeans(np.ascontiguousarray(z_Nd[sample], np.float32), lists)
    groups = _kmeans(centroids, max(1, int(lists**0.5)))
    _, group = faiss.knn(centroids, groups, 1, metric=faiss.METRIC_INNER_PRODUCT)
    return np.ascontiguousarray(centroids[np.argsort(group[:, 0], kind="stable")])


def nearest_lists(query_Qd: np.ndarray, centroids_Ld: np.ndarray, probes: int) -> np.ndarray:
    """int32 [Q, probes] lists for each query, nearest first."""
    import faiss

    query = np.ascontiguousarray(query_Qd, np.float32)
    _, found = faiss.knn(query, centroids_Ld, probes, metric=faiss.METRIC_INNER_PRODUCT)
    return found.astype(np.int32)


def scan(
    query_Qd: np.ndarray,
    self_Q: np.ndarray,
    probe_QP: np.ndarray,
    z_Nd: np.ndarray,
    order_N: np.ndarray,
    start_L1: np.ndarray,
    m: int,
    keep: int,
) -> np.ndarray:
    """[Q, m] int32: the best of the ``keep`` nearest members of each probed list; -1 = none.

    Args:
        query_Qd: float32.
        self_Q: each query's own node, excluded.
        probe_QP: lists to probe, as ``nearest_lists`` returns them.
        z_Nd: float32 rows of the members.
        order_N: nodes, list by list.
        start_L1: the members of list l are ``order_N[start[l] : start[l + 1]]``.
        m: number of results.
        keep: maximum results from one list.
    """
    import faiss

    queries, probes = probe_QP.shape
    keys = np.full((queries, probes, keep + 1), np.iinfo(np.int64).max)
    by_list = np.argsort(probe_QP, axis=None, kind="stable")
    lists, first = np.unique(probe_QP.ravel()[by_list], return_index=True)
    for number, asking in zip(lists, np.split(by_list, first[1:]), strict=True):
        members = order_N[start_L1[number] : start_L1[number + 1]]
        count = min(keep + 1, len(members))  # one more: the query may be its own nearest
        if not count:
            continue
        row, place = asking // probes, asking % probes
        near, found = faiss.knn(
            query_Qd[row], np.ascontiguousarray(z_Nd[members]), count,
            metric=faiss.METRIC_INNER_PRODUCT,
        )  # fmt: skip
        ids = members[found]
        ids[ids == self_Q[row][:, None]] = -1
        keys[row, place, :count] = sort_keys(near, ids)
    best = ids_of(np.sort(keys.reshape(queries, -1), axis=1)[:, :m])
    if best.shape[1] < m:
        best = np.pad(best, ((0, 0), (0, m - best.shape[1])), constant_values=-1)
    return best


def _kmeans(points: np.ndarray, count: int) -> np.ndarray:
    import faiss

    if count >= len(points):
        return points
    means = faiss.Kmeans(
        points.shape[1], count, niter=6, seed=SEED, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=SAMPLE_PER_LIST,
    )  # fmt: skip
    means.train(points)
    return np.asarray(means.centroids)
