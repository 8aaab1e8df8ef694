"""Networks and recipe for many small color images: those of the preset ``cifar10``, narrower where time is short.

On CIFAR-10 in five minutes of two cores they end far above a narrow ResNet under AdamW (docs/first_config.md).
"""

from __future__ import annotations

from typing import Any

LARGEST, FEWEST = 48, 10_000
"""Pixels and training images within which the recipe is used: it has been tried on such images only."""
BATCH = 512
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
    "lr": 0.75,
    "weight_decay": 0.0013,
    "bias_lr": 64,
    "clip": 0,
    "schedule": "triangular",
    "average": "lookahead",
    "average_decay": 0.95,
    "average_ramp": 3,
}


def suit(size: int, images: int, grey: bool) -> bool:
    """Whether these networks are the ones to choose from for this image size and number of training images."""
    return size <= LARGEST and images >= FEWEST and not grey


def networks(device: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Teacher and stem of each pair, ascending; the widest only on GPUs."""
    return [
        (
            {"arch": "whitened_cnn", "args": {"widths": list(teacher)}},
            {"stem": "whitened_cnn", "stem_args": {"widths": list(stem)}},
        )
        for teacher, stem in _WIDTHS[: None if device == "cuda" else -1]
    ]


def training(size: int, ranks: int) -> dict[str, Any]:
    """Fields of ``teacher`` and ``student`` besides their networks and epochs."""
    return {
        "early_size": size * 3 // 4,
        "early_share": 0.5,
        "global_batch": BATCH // ranks * ranks,
        **_RECIPE,
    }
