"""From image bytes to a batch of views: a reader's work between storage and the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Wanted(NamedTuple):
    """Views of one specification, by their numbers, and their destination: uint8 [V, N, size, size, 3]."""

    spec: ViewSpec
    numbers: Sequence[int]
    images_VNHWC: np.ndarray

    @property
    def cut(self) -> bool:
        """Whether the views are cut from the image itself, not from a clean view of fixed size."""
        return self.spec.kind == "random_resized_crop" and CLEAN not in self.numbers


def fill_views(
    spec: ViewSpec, blobs: Sequence[bytes], ids_N: np.ndarray, view: int, images: np.ndarray
) -> Wrong:
    """Decode and augment N images into ``images`` [N, size, size, 3] uint8; as :func:`fill_several`."""
    return fill_several([Wanted(spec, (view,), images[None])], blobs, ids_N)


def fill_several(wanted: Sequence[Wanted], blobs: Sequence[bytes], ids_N: np.ndarray) -> Wrong:
    """Decode each of N images once and fill all wanted views of it.

    Returns:
        The rows of corrupt images, with the reasons; these rows of all views are left unchanged.
    """
    cuts = [
        _Cut(one.spec, number, images)
        for one in wanted
        if one.cut
        for number, images in zip(one.numbers, one.images_VNHWC, strict=True)
    ]
    whole = [one for one in wanted if not one.cut]
    if not whole:
        return _fill_cuts(cuts, blobs, ids_N)
    # Not into the views themselves: a corrupt image may leave a row half written.
    cleans = [np.zeros_like(one.images_VNHWC[0]) for one in whole]
    wrong: Wrong = {}
    alone = len(whole) == 1 and not cuts and whole[0].spec.short == whole[0].spec.size
    held: list[_Held] = []
    for row, data in enumerate(blobs):
        target = cleans[0][row] if alone else None
        try:
            image = decode(data, target)
            if image is not target:
                for one, clean in zip(whole, cleans, strict=True):
                    clean_into(one.spec, clean[row], image)
        except CorruptSample as error:
            wrong[row] = error
            continue
        if cuts:
            held.append((row, image.shape[:2], image))
            if sum(h * w for _, (h, w), _ in held) > MOST_HELD:
                _cut(cuts, held, ids_N)
                held = []
    _cut(cuts, held, ids_N)
    sound: slice | list[int] = slice(None)
    if wrong:
        sound = [row for row in range(len(blobs)) if row not in wrong]
    for one, clean in zip(whole, cleans, strict=True):
        for number, images in zip(one.numbers, one.images_VNHWC, strict=True):
            images[sound] = shifted(one.spec, clean, ids_N, number)[sound]
    return wrong


class _Cut(NamedTuple):
    """One random resized crop of each image, into ``images`` [N, size, size, 3]."""

    spec: ViewSpec
    view: int
    images: np.ndarray


_Held = tuple[int, tuple[int, ...], bytes | np.ndarray]
"""Row, (height, width), and the bytes of a JPEG or the pixels of any other image."""


def _fill_cuts(cuts: Sequence[_Cut], blobs: Sequence[bytes], ids_N: np.ndarray) -> Wrong:
    """Fill random resized crops; headers are read first, so that only the crops need decoding."""
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
            wrong |= _cut(cuts, held, ids_N)
            held, waiting = [], 0
    return wrong | _cut(cuts, held, ids_N)


def _cut(cuts: Sequence[_Cut], held: Sequence[_Held], ids_N: np.ndarray) -> Wrong:
    """Decode what the crops of each held image need, once, and fill them."""
    wrong: Wrong = {}
    rows = [row for row, _, _ in held]
    sizes_M2 = np.array([size for _, size, _ in held], np.int64).reshape(-1, 2)
    corners = []
    for spec, view, _ in cuts:
        box = boxes(spec, ids_N[rows], sizes_M2[:, 0], sizes_M2[:, 1], view)
        corners.append(list(zip(*(column.tolist() for column in box), strict=True)))
    for place, (row, size, source) in enumerate(held):
        own = [corner[place] for corner in corners]
        y, x = min(box[0] for box in own), min(box[1] for box in own)
        if isinstance(source, bytes):
            high = max(box[0] + box[2] for box in own) - y
            wide = max(box[1] + box[3] for box in own) - x
            try:
                image = decode_crop(source, (size[0], size[1]), y, x, high, wide)
            except CorruptSample as error:
                wrong[row] = error
                continue
        else:
            image = source[y:, x:]
        for (_, _, images), (top, left, high, wide, flip) in zip(cuts, own, strict=True):
            crop = image[top - y : top - y + high, left - x : left - x + wide]
            resized_into(images[row], crop, flip)
    sound = [row for row in rows if row not in wrong]
    for spec, view, images in cuts:
        if sound and spec.distorts:
            images[sound] = distorted(spec, images[sound], ids_N[sound], view)
    return wrong
