"""Thumbnails of images that are added, like those of the memory."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, render
from cnn2gnn_dist.inference.memory.view import Memory

SIDE, QUALITY = 64, 85
"""Side in pixels where the memory is empty, and quality of the JPEGs."""
_SAMPLED = 16
"""Rows looked at to find out whether a memory has thumbnails: a corrupt image never has one."""


def side_of(memory: Memory) -> int:
    """Side of a memory's thumbnails in pixels; 0: it has none, and gets none."""
    rows = memory.live_ids[:_SAMPLED].tolist()
    found = next((data for row in rows if (data := memory.thumbnail(row)) is not None), None)
    if found is None:
        return 0 if rows else SIDE
    return min(Image.open(io.BytesIO(found)).size)


def thumbnail(pixels: np.ndarray, side: int) -> bytes:
    """The JPEG of an image uint8 [S, S, 3], resized as those of the training images are."""
    shown = render(ViewSpec(kind="none", size=side, flip=False), pixels, 0, CLEAN)
    data = io.BytesIO()
    Image.fromarray(shown).save(data, "JPEG", quality=QUALITY)
    return data.getvalue()
