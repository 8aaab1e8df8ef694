"""Images to tensors as users write it: Pillow and torchvision's transforms v2."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from typing import Any

from loaders.job import Job

from cnn2gnn_dist.compat import import_torchvision


def transform(job: Job, tensors: bool = False) -> Callable[[Any], Any]:
    """A PIL image, or with ``tensors`` a uint8 tensor [3, H, W], to an augmented uint8 tensor [3, size, size]."""
    import_torchvision()
    from torchvision.transforms import v2

    if job.kind == "photos":
        crop: Any = v2.RandomResizedCrop(job.size, antialias=True)
    else:
        crop = v2.RandomCrop(job.size, padding=4)
    steps = [crop, v2.RandomHorizontalFlip()]
    return v2.Compose(steps if tensors else [*steps, v2.PILToTensor()])


def random_box(high: int, wide: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random resized crop, drawn as torchvision does."""
    for _ in range(10):
        area = high * wide * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        broad, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < broad <= wide and 0 < tall <= high:
            return random.randint(0, high - tall), random.randint(0, wide - broad), tall, broad
    tall, broad = min(high, round(wide * 4 / 3)), min(wide, round(high * 4 / 3))
    return (high - tall) // 2, (wide - broad) // 2, tall, broad


def opened(data: bytes) -> Any:
    """Encoded bytes as an RGB PIL image."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def one_thread(_: int = 0) -> None:
    """For a worker: cores are allotted per process, not per thread."""
    import torch

    torch.set_num_threads(1)
