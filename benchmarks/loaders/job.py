"""One run of one contender, and how its speed is measured."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil

from cnn2gnn_dist.data.images.views import ViewSpec

WORKERS = 2
"""Number of readers of every contender: what a user would choose for two cores."""


@dataclass
class Job:
    """What a contender reads, and for how long.

    Attributes:
        module, options: the contender and its own settings.
        kind: "photos" (random resized crop) or "small" (pad, crop, flip).
        folder: where the contender may store its own format.
        shards, manifest: the same images for all.
        images: per pass, in which an image may occur several times, through ``copies`` of its shard.
        passes, seconds: reading ends after that many passes or seconds, whichever is first.
        settle: images after which the clock starts; at least the first batch.
        born: time.time() when the parent started this run's process.
    """

    module: str
    kind: str
    folder: str
    shards: list[str]
    manifest: str
    images: int
    copies: int
    batch: int
    size: int
    passes: int
    seconds: float
    settle: int = 0
    born: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def views(self) -> ViewSpec:
        """The views of our own loaders; the others draw the same kind with torchvision."""
        kind = "random_resized_crop" if self.kind == "photos" else "crop_flip"
        return ViewSpec(kind, self.size, seed=0, pad=4)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        tree = json.loads(path.read_text())
        return cls(**{f.name: tree[f.name] for f in fields(cls)})


def measure(job: Job, batches: Iterator[Any]) -> dict[str, float]:
    """Images per second from the first batch (or the first ``settle`` images) to the last.

    Also the seconds from the start of the process to the first batch, CPU milliseconds per image of this
    process and its children (which other work on the machine affects little), and the fraction of the cores
    that other processes used in the meantime.
    """
    count, first, start, mark = 0, 0.0, 0.0, (0.0, 0.0)
    with contextlib.closing(batches):  # type: ignore[type-var]
        for batch in batches:
            touch(batch)
            now = time.perf_counter()
            if not first:
                first = time.time() - job.born
            if not start:
                count += len(batch)
                if count >= job.settle:
                    count, mark, start = 0, cpu_seconds(), time.perf_counter()
                continue
            count += len(batch)
            if now - start > job.seconds:
                break
        wall = time.perf_counter() - start
        own, busy = (now - then for now, then in zip(cpu_seconds(), mark, strict=True))
    if not start or not count:
        raise RuntimeError("too few batches to measure their speed: more passes are needed")
    return {
        "rate": count / wall,
        "start": first,
        "cpu_ms": own / count * 1e3,
        "others": max(0.0, busy - own) / (wall * (os.cpu_count() or 1)),
        "images": count,
    }


def touch(batch: Any) -> int:
    """Read one byte of a batch, so that no loader can return a lazy result."""
    first = batch[0]
    while getattr(first, "ndim", 0):
        first = first[0]
    return int(first)


def cpu_seconds() -> tuple[float, float]:
    """CPU time of this process and its descendants so far, and of the whole machine."""
    machine = psutil.cpu_times()
    own = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            own += sum(process.cpu_times()[:4])  # its own, and that of its children that exited
    return own, machine.user + machine.system + machine.nice


def warm(paths: list[str]) -> None:
    """Read files once, so that they are in the page cache."""
    for path in paths:
        Path(path).read_bytes()
