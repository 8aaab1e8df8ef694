"""Images to tensors as users write it: Pillow and torchvision's transforms v2."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from loaders.job import Job

from cnn2gnn_dist.compat import import_torchvision


def transform(job: Job) -> Callable[[Any], Any]:
    """A PIL image to an augmented uint8 tensor [3, size, size]."""
    import_torchvision()
    from torchvision.transforms import v2

    if job.kind == "photos":
        crop: Any = v2.RandomResizedCrop(job.size, antialias=True)
    else:
        crop = v2.RandomCrop(job.size, padding=4)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])


def opened(data: bytes) -> Any:
    """Encoded bytes as an RGB PIL image."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def one_thread(_: int = 0) -> None:
    """For a worker: cores are allotted per process, not per thread."""
    import torch

    torch.set_num_threads(1)
