"""From image bytes to a batch of views: a reader's work between storage and the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnn2gnn_dist.data.images.decode import CorruptSample, decode, decode_crop, jpeg_size
from cnn2gnn_dist.data.images.views import (
    CLEAN,
    ViewSpec,
    boxes,
    clean_into,
    distorted,
    resized_into,
    shifted,
)

MOST_HELD = 4_000_000
"""Maximum pixels of decoded images held back to be cropped together."""

Wrong = dict[int, CorruptSample]


def fill_views(
    spec: ViewSpec, blobs: Sequence[bytes], ids_N: np.ndarray, view: int, images: np.ndarray
) -> dict[int, CorruptSample]:
    """Decode and augment N images into ``images`` [N, size, size, 3] uint8.

    Returns:
        The rows of corrupt images, with the reasons; these rows of ``images`` are left unchanged.
    """
    if view != CLEAN and spec.kind == "random_resized_crop":
        return _fill_crops(spec, blobs, ids_N, view, images)
    clean = np.zeros_like(images)  # not ``images``: a corrupt image may leave a row half written
    wrong: Wrong = {}
    as_it_is = spec.short == spec.size
    for row, data in enumerate(blobs):
        target = clean[row]
        try:
            image = decode(data, target if as_it_is else None)
            if image is not target:
                clean_into(spec, target, image)
        except CorruptSample as error:
            wrong[row] = error
    made = shifted(spec, clean, ids_N, view)
    if wrong:
        sound = [row for row in range(len(blobs)) if row not in wrong]
        images[sound] = made[sound]
    else:
        images[:] = made
    return wrong


def _fill_crops(
    spec: ViewSpec, blobs: Sequence[bytes], ids_N: np.ndarray, view: int, images: np.ndarray
) -> Wrong:
    """Fill random resized crops; headers are read first, so that only the crop needs decoding."""
    wrong: Wrong = {}
    held: list[_Held] = []
    waiting = 0
    for row, data in enumerate(blobs):
        try:
            size = jpeg_size(data)
            if size:
                held.append((row, size, data))
                continue
            image = decode(data)
        except CorruptSample as error:
            wrong[row] = error
            continue
        held.append((row, image.shape[:2], image))
        waiting += image.shape[0] * image.shape[1]
        if waiting > MOST_HELD:
            wrong |= _cut(spec, held, ids_N, view, images)
            held, waiting = [], 0
    return wrong | _cut(spec, held, ids_N, view, images)


_Held = tuple[int, tuple[int, ...], bytes | np.ndarray]
"""Row, (height, width), and the bytes of a JPEG or the pixels of any other image."""


def _cut(
    spec: ViewSpec, held: list[_Held], ids_N: np.ndarray, view: int, images: np.ndarray
) -> Wrong:
    wrong: Wrong = {}
    rows = [row for row, _, _ in held]
    sizes_M2 = np.array([size for _, size, _ in held], np.int64).reshape(-1, 2)
    box = boxes(spec, ids_N[rows], sizes_M2[:, 0], sizes_M2[:, 1], view)
    corners = zip(*(column.tolist() for column in box), strict=True)
    for (row, size, source), (top, left, high, wide, flip) in zip(held, corners, strict=True):
        if isinstance(source, bytes):
            try:
                crop = decode_crop(source, (size[0], size[1]), top, left, high, wide)
            except CorruptSample as error:
                wrong[row] = error
                continue
        else:
            crop = source[top : top + high, left : left + wide]
        resized_into(images[row], crop, flip)
    sound = [row for row in rows if row not in wrong]
    if sound and (spec.cutout or spec.randaugment):
        images[sound] = distorted(spec, images[sound], ids_N[sound], view)
    return wrong
