"""Time to the first batch at the first and at the last batch of an epoch."""

from __future__ import annotations

import statistics
import time

from loaders.job import WORKERS, Job
from loaders.ours import opened

ROUNDS = {"local": 41, "ray": 5}
"""A reader actor takes seconds to start, a thread almost no time."""


def figures(job: Job) -> dict[str, float]:
    """Median milliseconds to a batch from scratch (no stream, no readers, no open shard)."""
    backend = job.options["backend"]
    if backend == "ray":
        from cnn2gnn_dist.runtime.ray import cluster as ray_cluster

        ray_cluster.start(None, cpus=WORKERS)
    _seconds(job, 0)  # imports
    with opened(job) as stream:
        last = len(stream) - 1
    pairs = [(_seconds(job, 0), _seconds(job, last)) for _ in range(ROUNDS[backend])]
    first, end = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "batches": last + 1,
        "ms at batch 0": first * 1e3,
        "ms at the last": end * 1e3,
        "last / first": statistics.median(b / a for a, b in pairs),
        "rounds": len(pairs),
    }


def _seconds(job: Job, batch: int) -> float:
    began = time.perf_counter()
    with opened(job) as stream:
        stream.batch = batch
        next(iter(stream))
        return time.perf_counter() - began
