"""Time that models take per image, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Classify = Callable[[Tensor], Any]


class Milliseconds(NamedTuple):
    """Median milliseconds per image: of a batch, and of an image alone."""

    in_batch: float
    alone: float


@torch.no_grad()
def milliseconds_per_image(
    models: Mapping[str, Classify], images: Tensor, at_least: int
) -> dict[str, Milliseconds]:
    """Time every model on one CPU thread, after a warm-up.

    The models take turns in every round, so that whatever else the machine does affects all of them.

    Args:
        models: functions that classify a batch.
        images: one batch; single images are taken from it.
        at_least: images that each model classifies in batches; a quarter of them, one by one.
    """
    with _one_thread():
        rounds = max(3, -(-at_least // len(images)))
        in_batch = _medians(models, [images] * (rounds + 1))
        singles = [images[n % len(images)][None] for n in range(max(3, at_least // 4) + 1)]
        alone = _medians(models, singles)
    return {
        name: Milliseconds(in_batch[name] * 1000 / len(images), alone[name] * 1000)
        for name in models
    }


def _medians(models: Mapping[str, Classify], batches: list[Tensor]) -> dict[str, float]:
    """Median seconds per batch of each model; the first batch is the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for batch in batches:
        for name, classify in models.items():
            began = time.perf_counter()
            classify(batch)
            if batch.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(found[1:])) for name, found in seconds.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
