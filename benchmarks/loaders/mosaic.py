"""MosaicML streaming: the same JPEG bytes in MDS shards, torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loaders.job import WORKERS, Job
from loaders.samples import members
from loaders.users import one_thread, opened, transform

from cnn2gnn_dist.compat import import_torchvision


def prepare(job: Job) -> None:
    import_torchvision()
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(_folder(job)), columns=columns, size_limit=1 << 26) as writer:
        for image, label in members(job):
            writer.write({"image": image, "label": label})


def batches(job: Job) -> Iterator[Any]:
    import_torchvision()
    from streaming import Stream, StreamingDataset
    from torch.utils.data import DataLoader

    class Images(StreamingDataset):
        def __init__(self) -> None:
            stream = Stream(local=str(_folder(job)), repeat=job.copies * job.passes)
            super().__init__(streams=[stream], shuffle=True, batch_size=job.batch)
            self.transform = transform(job)

        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return self.transform(opened(sample["image"])), sample["label"]

    loader = DataLoader(
        Images(), batch_size=job.batch, num_workers=WORKERS, worker_init_fn=one_thread
    )
    for images, _ in loader:
        yield images


def _folder(job: Job) -> Path:
    return Path(job.folder) / "mds"
