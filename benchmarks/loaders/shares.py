"""Profile of our own loader: each step's share of a reader, and what the pool adds or loses.

The steps are timed by wrapping the functions that the reader calls; a step's time excludes that of the steps it
calls. Shares are of one thread's time; the other figures are processor time, which other work on the machine
hardly affects.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from loaders.job import WORKERS, Job
from loaders.ours import opened

from cnn2gnn_dist.data.images import batch_views
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.reading import reader, shard_files
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request

STEPS: list[tuple[str, Any, str]] = [
    ("read", shard_files.ShardFiles, "read_all"),
    ("decode", batch_views, "decode"),
    ("decode", batch_views, "decode_crop"),
    ("decode", batch_views, "jpeg_size"),
    ("draw", batch_views, "boxes"),
    ("crop, resize", batch_views, "resized_into"),
    ("crop, resize", batch_views, "clean_into"),
    ("crop, resize", batch_views, "shifted"),
    ("rest of imaging", reader, "fill_several"),
    ("rest of reader", reader.Reader, "read"),
]


def figures(job: Job) -> dict[str, float | str]:
    """µs of processor time per image in one thread, and each step's share; also the pool's figures."""
    _read(job, 0.2)  # imports
    found: dict[str, float | str] = {"CPU µs an image": _one_thread(job) * 1e6}
    found |= _pool(job)
    spent = _wrapped()  # last: the wrappers cost time themselves
    _read(job, job.seconds / 3)
    total = sum(spent.values())
    return found | {name: f"{seconds / total:.1%}" for name, seconds in spent.items()}


def _one_thread(job: Job) -> float:
    began = time.process_time()
    count = _read(job, job.seconds / 3)
    return (time.process_time() - began) / count


def _pool(job: Job) -> dict[str, float]:
    """Two threads and a consumer: processor time per image, cores used, the time that the consumer waits."""
    count, job.options["backend"] = 0, "local"
    with opened(job) as stream:
        began, mark = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < job.seconds / 3:
            for batch in stream:
                count += len(batch.images)
                if time.perf_counter() - began > job.seconds / 3:
                    break
        own, wall = time.process_time() - mark, time.perf_counter() - began
    return {f"CPU µs, {WORKERS} threads": own / count * 1e6, "cores used": own / wall}


def _read(job: Job, seconds: float) -> int:
    """Read batches here for a while; return the number of images."""
    alone = Reader(ReaderSpec(job.manifest, job.views))
    order = Order(alone.manifest.shard_sizes, seed=0, global_batch=job.batch, window=8)
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        epoch, index = divmod(count // job.batch, order.batches_per_epoch)
        count += len(alone.read(Request(order.batch(epoch, index), epoch)).images)
    alone.close()
    return count


def _wrapped() -> dict[str, float]:
    """Wrap all steps; the result sums the own seconds of each."""
    spent: dict[str, float] = {name: 0.0 for name, _, _ in STEPS}
    inner = [0.0]  # a stack: seconds of the steps called by the current one

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                spent[name] += took - inner.pop()
                inner[-1] += took

        return run

    for name, where, attribute in STEPS:
        setattr(where, attribute, timed(name, getattr(where, attribute)))
    return spent
