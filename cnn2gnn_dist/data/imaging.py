"""From image bytes to views: what a reader does between storage and the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnn2gnn_dist.data.decode import CorruptSample, decode
from cnn2gnn_dist.data.views import ViewSpec, render, render_batch


def fill_views(
    spec: ViewSpec, blobs: Sequence[bytes], ids_N: np.ndarray, view: int, images: np.ndarray
) -> dict[int, CorruptSample]:
    """Decode and augment N images into ``images`` [N, size, size, 3] uint8.

    Returns:
        The rows that are no whole images, left as they were, with what is wrong.
    """
    decoded: list[np.ndarray] = []
    wrong: dict[int, CorruptSample] = {}
    for row, data in enumerate(blobs):
        try:
            decoded.append(decode(data))
        except CorruptSample as error:
            wrong[row] = error
    rows = [row for row in range(len(blobs)) if row not in wrong]
    try:
        images[rows] = render_batch(spec, decoded, ids_N[rows], view)
    except CorruptSample:  # rare: an image too narrow to be resized; find out which
        for row, image in zip(rows, decoded, strict=True):
            try:
                images[row] = render(spec, image, int(ids_N[row]), view)
            except CorruptSample as error:
                wrong[row] = error
    return wrong
