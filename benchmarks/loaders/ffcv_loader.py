"""FFCV: its own file of the images, JPEGs written again at quality 90 or raw pixels, and its compiled loader.

Its pixels are not those of the others: a JPEG is decoded at a reduced size where the crop allows it, and
resized by OpenCV's area filter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from loaders.job import WORKERS, Job
from loaders.samples import members
from loaders.users import opened

from cnn2gnn_dist.compat import import_torchvision


def prepare(job: Job) -> None:
    import_torchvision()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    mode = {"write_mode": "jpg", "jpeg_quality": 90} if job.kind == "photos" else {}
    fields = {"image": RGBImageField(**mode), "label": IntField()}
    samples = [(opened(image), label) for image, label in members(job)]
    DatasetWriter(str(_file(job)), fields, num_workers=1).from_indexed_dataset(samples)


def batches(job: Job) -> Iterator[Any]:
    import_torchvision()
    from ffcv import transforms
    from ffcv.fields import decoders
    from ffcv.loader import Loader, OrderOption

    if job.kind == "photos":
        steps = [decoders.RandomResizedCropRGBImageDecoder((job.size, job.size))]
    else:
        steps = [decoders.SimpleRGBImageDecoder(), transforms.RandomTranslate(padding=4)]
    loader = Loader(
        str(_file(job)),
        batch_size=job.batch,
        num_workers=WORKERS,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        indices=np.tile(np.arange(job.images // job.copies), job.copies),
        pipelines={
            "image": [*steps, transforms.RandomHorizontalFlip()],
            "label": [decoders.IntDecoder()],
        },
    )
    for _ in range(job.passes):
        for images, _ in loader:
            yield images


def _file(job: Job) -> Path:
    return Path(job.folder) / "images.beton"
