"""The same table by other libraries, with at least our recall and two threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import measures

SAMPLE = 256
Search = Callable[[np.ndarray], np.ndarray]
"""Queries to ids, including the query itself."""


def rival(folder: Path, name: str, goal: float) -> dict[str, Any]:
    """Build, choose the cheapest setting that reaches the goal on a sample, and search for all rows."""
    z = np.ascontiguousarray(measures.nodes_of(folder)["z"])
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(z), SAMPLE, replace=False))
    truth = _exact(z, rows)
    ways = {
        "faiss IVF": _ivf,
        "faiss HNSW": _faiss_hnsw,
        "hnswlib": _hnswlib,
        "pynndescent": _descent,
    }
    settings = ways[name](z)
    if name == "pynndescent":
        next(ways[name](z[:5000]))  # compiles, which is not timed
    started, built, recall, setting = time.perf_counter(), 0.0, -1.0, ""
    while recall < goal and (step := next(settings, None)):
        built = built or time.perf_counter() - started
        setting, search = step
        recall = _recall(search(rows if name == "pynndescent" else z[rows]), rows, truth)
    started = time.perf_counter()
    if name != "pynndescent":
        for start in range(0, len(z), 65_536):
            search(z[start : start + 65_536])
    searched = time.perf_counter() - started
    return {
        "seconds": built + searched,
        "build_seconds": built,
        "recall": recall,
        "setting": setting,
        "peak_gib": measures.peak_gib(),
    }


def _ivf(z: np.ndarray) -> Iterator[tuple[str, Search]]:
    import faiss

    faiss.omp_set_num_threads(measures.THREADS)
    lists = int(1.8 * len(z) ** 0.5)
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(z.shape[1]), z.shape[1], lists, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.max_points_per_centroid, index.cp.niter = 50, 6
    index.train(z)
    index.add(z)
    for probes in (3, 4, 6, 8, 12, 16, 24):
        index.nprobe = probes
        yield (
            f"{lists} lists, {probes} probes",
            lambda query: index.search(query, measures.M + 1)[1],
        )


def _faiss_hnsw(z: np.ndarray) -> Iterator[tuple[str, Search]]:
    import faiss

    faiss.omp_set_num_threads(measures.THREADS)
    index = faiss.IndexHNSWFlat(z.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 60
    index.add(z)
    for width in (24, 32, 48, 64, 96, 128):
        index.hnsw.efSearch = width
        yield f"16 links, efSearch {width}", lambda query: index.search(query, measures.M + 1)[1]


def _hnswlib(z: np.ndarray) -> Iterator[tuple[str, Search]]:
    import hnswlib  # type: ignore[import-not-found]

    index = hnswlib.Index(space="ip", dim=z.shape[1])
    index.init_index(max_elements=len(z), ef_construction=60, M=16, random_seed=0)
    index.set_num_threads(measures.THREADS)
    index.add_items(z)
    for width in (24, 32, 48, 64, 96, 128):
        index.set_ef(width)
        yield f"16 links, ef {width}", lambda query: index.knn_query(query, measures.M + 1)[0]


def _descent(z: np.ndarray) -> Iterator[tuple[str, Search]]:
    import pynndescent  # type: ignore[import-not-found]

    index = pynndescent.NNDescent(
        z, metric="cosine", n_neighbors=17, n_jobs=measures.THREADS, random_state=0, compressed=True
    )
    ids = index.neighbor_graph[0]
    yield "17 neighbours", lambda rows: ids[rows]


def _exact(z: np.ndarray, rows: np.ndarray) -> np.ndarray:
    import faiss

    found = faiss.knn(z[rows], z, 12, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return np.stack([own[own != row][:10] for own, row in zip(found, rows, strict=True)])


def _recall(found: np.ndarray, rows: np.ndarray, truth: np.ndarray) -> float:
    hits = [
        np.isin(t, f[f != r][: measures.M]).mean()
        for f, r, t in zip(found, rows, truth, strict=True)
    ]
    return float(np.mean(hits))
