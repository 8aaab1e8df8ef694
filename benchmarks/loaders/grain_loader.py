"""grain: ArrayRecord files of the same encoded images, its own worker processes and shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loaders.job import WORKERS, Job
from loaders.samples import members
from loaders.users import opened, transform


def prepare(job: Job) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(_file(job)), "group_size:1")  # random access, as grain advises
    for image, label in members(job):
        writer.write(label.to_bytes(4, "little") + image)
    writer.close()


def batches(job: Job) -> Iterator[Any]:
    import grain

    data = grain.MapDataset.source(grain.sources.ArrayRecordDataSource([str(_file(job))]))
    data = data.seed(0).shuffle().repeat(job.copies * job.passes)
    data = data.map(_View(job)).batch(job.batch, drop_remainder=True)
    threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    processes = grain.multiprocessing.MultiprocessingOptions(
        num_workers=WORKERS, per_worker_buffer_size=2
    )
    for images, _ in data.to_iter_dataset(threads).mp_prefetch(processes):
        yield images


class _View:
    """A record to an augmented image, uint8 [3, size, size], and its label."""

    def __init__(self, job: Job) -> None:
        self.job, self.augment = job, None

    def __call__(self, record: bytes) -> tuple[Any, int]:
        self.augment = self.augment or transform(self.job)  # here, in the worker
        return self.augment(opened(record[4:])).numpy(), int.from_bytes(record[:4], "little")


def _file(job: Job) -> Path:
    return Path(job.folder) / "images.array_record"
