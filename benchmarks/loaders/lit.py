"""litdata: the same JPEG bytes in its own chunks, StreamingDataLoader."""

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
    import litdata

    samples = members(job)
    litdata.optimize(
        fn=_Sample(samples),
        inputs=list(range(len(samples))),
        output_dir=str(_folder(job)),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )


class _Sample:
    def __init__(self, samples: list[tuple[bytes, int]]) -> None:
        self.samples = samples

    def __call__(self, index: int) -> dict[str, Any]:
        image, label = self.samples[index]
        return {"image": image, "label": label}


def batches(job: Job) -> Iterator[Any]:
    import_torchvision()
    import litdata

    class Images(litdata.StreamingDataset):
        def __init__(self) -> None:
            super().__init__(
                str(_folder(job)), shuffle=True, subsample=float(job.copies * job.passes)
            )
            self.augment = transform(job)

        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return self.augment(opened(sample["image"])), sample["label"]

    loader = litdata.StreamingDataLoader(
        Images(), batch_size=job.batch, num_workers=WORKERS, worker_init_fn=one_thread
    )
    for images, _ in loader:
        yield images


def _folder(job: Job) -> Path:
    return Path(job.folder) / "lit"
