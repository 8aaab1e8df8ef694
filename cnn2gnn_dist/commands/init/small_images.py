"""Networks and recipe for small color images: those of the preset ``cifar10``, narrower where time is short.

Whether there are many of them or few, they end far above a narrow ResNet under AdamW (docs/first_config.md).
"""

from __future__ import annotations

import math
from typing import Any

LARGEST = 64
"""Pixels up to which the recipe is used: it has been tried on such images only."""
MANY = 10_000
"""Training images from which larger networks on larger images may be the better choice."""
BATCH = 512
"""Images of a step for which the recipe was found."""
_FEWEST_STEPS = 4  # of an epoch
_LARGE = (
    48  # pixels from which a fourth block leaves as few positions as three do on smaller images
)
_WIDTHS: tuple[tuple[list[int], list[int]], ...] = (
    ([32, 64, 64], [16, 32, 64]),
    ([32, 128, 128], [16, 64, 64]),
    ([64, 192, 192], [32, 64, 96]),
    ([64, 256, 256], [32, 96, 128]),
    ([128, 384, 384], [64, 128, 256]),
)
"""Channels of teacher and student, which has about a quarter of the operations."""
_RECIPE: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.85,
    "weight_decay": 0.0013,
    "bias_lr": 64,
    "clip": 0,
    "schedule": "triangular",
    "average": "lookahead",
    "average_decay": 0.95,
    "average_ramp": 3,
}
_LR = 0.75  # at BATCH
_SLOWER = 5


def suit(size: int, grey: bool) -> bool:
    """Whether these networks are the ones to choose from for this image size."""
    return size <= LARGEST and not grey


def networks(size: int, device: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Teacher and stem of each pair for images of this size, ascending; the widest only on GPUs."""
    more = 1 if size > _LARGE else 0
    return [
        (
            {"arch": "whitened_cnn", "args": {"widths": teacher + more * [2 * teacher[-1]]}},
            {"stem": "whitened_cnn", "stem_args": {"widths": stem + more * [2 * stem[-1]]}},
        )
        for teacher, stem in _WIDTHS[: None if device == "cuda" else -1]
    ]


def batch(images: int) -> int:
    """Images per step: a power of two, at most that of the preset, and few enough that an epoch has some steps."""
    return min(BATCH, 1 << max(2, (images // _FEWEST_STEPS).bit_length() - 1))


def training(size: int, images: int, ranks: int) -> dict[str, Any]:
    """Fields of ``teacher`` and ``student`` besides their networks and epochs.

    The learning rate goes with the square root of the batch.
    """
    whole = batch(images)
    return {
        "early_size": size * 3 // 4,
        "early_share": 0.5,
        "global_batch": whole // ranks * ranks,
        "lr": round(_LR * math.sqrt(whole / BATCH), 3),
        **_RECIPE,
    }


def slower_head(lr: float) -> dict[str, float]:
    """Fields of the student's rates: that of the teacher for its stem, a fifth of it for the layers after it.

    At the teacher's rate a student of unbalanced classes ended with one answer for all images; balanced ones are
    classified as well with either (docs/first_config.md).
    """
    return {"lr": round(lr / _SLOWER, 4), "stem_lr": _SLOWER}
