"""webdataset with torch's DataLoader: as users write it, or with torchvision's decoder, or ours in its map function."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from loaders.job import WORKERS, Job
from loaders.users import one_thread, transform


def batches(job: Job) -> Iterator[Any]:
    import webdataset

    shards = job.shards * job.passes
    data = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000)
    if job.options.get("decoder") == "ours":
        data = data.to_tuple("jpg", "cls").batched(job.batch, collation_fn=list)
        data = data.map(OurViews(job))
    elif job.options.get("decoder") == "torchvision":
        from loaders.torchvision_jpeg import decoder

        decode, augment = decoder(Path(job.folder)), transform(job, tensors=True)
        data = data.to_tuple("jpg", "cls").map_tuple(lambda jpg: augment(decode(jpg)), int)
        data = data.batched(job.batch)
    else:
        data = data.decode("pil").to_tuple("jpg", "cls")
        data = data.map_tuple(transform(job), lambda label: label).batched(job.batch)
    loader = webdataset.WebLoader(
        data, batch_size=None, num_workers=WORKERS, worker_init_fn=one_thread
    )
    for images, _ in loader:
        yield images


class OurViews:
    """Turns the bytes of samples into a batch of views by this project's decoder."""

    def __init__(self, job: Job) -> None:
        self.job, self.calls = job, 0

    def __call__(self, samples: list[tuple[bytes, bytes]]) -> tuple[Any, Any]:
        import torch

        from cnn2gnn_dist.data.images.batch_views import fill_views

        size, n = self.job.size, len(samples)
        images = np.zeros((n, size, size, 3), np.uint8)
        ids = np.arange(n) + self.calls * n
        self.calls += 1
        fill_views(self.job.views, [jpg for jpg, _ in samples], ids, 0, images)
        labels = torch.tensor([int(label) for _, label in samples])
        return torch.from_numpy(images), labels
