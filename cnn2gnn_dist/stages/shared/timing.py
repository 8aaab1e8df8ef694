"""Time that a model takes per image, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def milliseconds_an_image(
    classify: Callable[[Tensor], Tensor], images: Tensor, at_least: int
) -> float:
    """Median milliseconds per image over batches of ``images``, on one CPU thread, after a warm-up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = max(3, -(-at_least // len(images)))
        seconds = []
        for number in range(rounds + 1):
            began = time.perf_counter()
            classify(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if number:
                seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return float(np.median(seconds)) * 1000 / len(images)
