"""SPDL: threads around FFmpeg, which decodes, crops, resizes and flips in one filter graph per image."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loaders.job import WORKERS, Job
from loaders.users import random_box


def batches(job: Job) -> Iterator[Any]:
    from spdl.pipeline import PipelineBuilder

    pipeline = (
        PipelineBuilder()
        .add_source(images(job))
        .aggregate(job.batch, drop_last=True)
        .pipe(_Views(job), concurrency=WORKERS)
        .add_sink(2 * WORKERS)
        .build(num_threads=WORKERS)
    )
    with pipeline.auto_stop():
        yield from pipeline


def images(job: Job) -> Iterator[bytes]:
    """Encoded images of all passes, shard by shard in random order, by SPDL's own tar reader."""
    import spdl.io

    for _ in range(job.passes):
        for shard in random.sample(job.shards, len(job.shards)):
            for name, data in spdl.io.iter_tarfile(Path(shard).read_bytes()):
                if name.endswith(".jpg"):
                    yield bytes(data)


class _Views:
    """Encoded images to uint8 [n, size, size, 3]."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, blobs: list[bytes]) -> Any:
        import spdl.io

        frames = []
        for data in blobs:
            packets = spdl.io.demux_image(data)
            steps = self._filters(packets.width, packets.height)
            frames.append(spdl.io.decode_packets(packets, filter_desc=",".join(steps)))
        return spdl.io.to_numpy(spdl.io.convert_frames(frames))

    def _filters(self, wide: int, high: int) -> list[str]:
        size = self.job.size
        if self.job.kind == "photos":
            top, left, tall, broad = random_box(high, wide)
            steps = [f"crop={broad}:{tall}:{left}:{top}", f"scale={size}:{size}:flags=bilinear"]
        else:
            padded = f"pad={wide + 8}:{high + 8}:4:4"
            steps = [padded, f"crop={size}:{size}:{random.randint(0, 8)}:{random.randint(0, 8)}"]
        if random.random() < 0.5:
            steps.append("hflip")
        return [*steps, "format=rgb24"]
