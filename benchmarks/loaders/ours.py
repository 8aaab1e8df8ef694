"""This project's stream, as a user opens it: threads or Ray actors behind one class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from loaders.job import WORKERS, Job

from cnn2gnn_dist.data.reading import shared_batches
from cnn2gnn_dist.data.reading.decoded_cache import cache_path
from cnn2gnn_dist.data.stream import Stream

DECODED = 1 << 31


def batches(job: Job) -> Iterator[np.ndarray]:
    """Batches of all epochs."""
    if job.options.get("decoded") == "fresh":
        remove_decoded(job)
    with opened(job) as stream:
        for _ in range(job.passes):
            for batch in stream:
                yield batch.images


def opened(job: Job) -> Stream:
    """The stream of a job; starts Ray if the job uses it."""
    backend = job.options["backend"]
    if backend == "ray":
        from cnn2gnn_dist.runtime.ray import cluster as ray_cluster

        ray_cluster.start(None, cpus=WORKERS)
        if job.options.get("store"):
            _through_the_store()
    return Stream(
        job.manifest,
        global_batch=job.batch,
        views=job.views,
        window=8,
        backend=backend,
        workers=job.options.get("workers", WORKERS),
        prefetch=4,
        decoded_bytes=DECODED if job.options.get("decoded") else 0,
    )


def _through_the_store() -> None:
    """Lend memory by a name that no reader finds, as readers of another host would not: they use Ray's store."""
    plain = shared_batches.Lender.loan
    shared_batches.Lender.loan = lambda self, buffer: replace(  # type: ignore[method-assign]
        plain(self, buffer), name="elsewhere"
    )


def remove_decoded(job: Job) -> None:
    """Delete the cache of decoded images."""
    from cnn2gnn_dist.data.index.manifest import Manifest

    path: Path = cache_path(job.manifest, Manifest.load(job.manifest), job.views)
    path.unlink(missing_ok=True)
