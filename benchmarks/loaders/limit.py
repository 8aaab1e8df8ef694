"""The upper bound: nothing but our decode, crop and resize on two cores, with the bytes already in memory."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from loaders.job import WORKERS, Job
from loaders.samples import members
from loaders.users import one_thread

from cnn2gnn_dist.data.images.batch_views import fill_views
from cnn2gnn_dist.data.reading.reader import CHUNK


def batches(job: Job) -> Iterator[np.ndarray]:
    """Yield the same array each time that a worker has filled such a batch."""
    blobs = [image for image, _ in members(job)]
    total = job.passes * job.images // job.batch
    done: Any
    if job.options["with"] == "threads":
        done, stop = queue.SimpleQueue(), threading.Event()
        start: Callable[..., Any] = threading.Thread
    else:
        context = multiprocessing.get_context("fork")
        done, stop = context.SimpleQueue(), context.Event()
        start = context.Process
    workers = [
        start(target=_work, args=(job, blobs, number, done, stop), daemon=True)
        for number in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    batch = np.zeros((job.batch, 1), np.uint8)
    try:
        for _ in range(total):
            done.get()
            yield batch
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def _work(job: Job, blobs: list[bytes], number: int, done: Any, stop: Any) -> None:
    one_thread()
    images = np.zeros((job.batch, job.size, job.size, 3), np.uint8)
    rng = np.random.default_rng(number)
    view = 0
    while not stop.is_set():
        ids = rng.integers(0, len(blobs), job.batch)
        for first in range(0, job.batch, CHUNK):
            rows = slice(first, first + CHUNK)
            fill_views(job.views, [blobs[i] for i in ids[rows]], ids[rows], view, images[rows])
        view += 1
        done.put(number)
