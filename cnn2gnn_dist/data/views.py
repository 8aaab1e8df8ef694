"""Views: augmentation as a pure function of (seed, sample id, view number).

The bytes equal torchvision's transforms v2 on tensors (resize: bilinear, antialiased).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cnn2gnn_dist.data.decode import MAX_PIXELS, CorruptSample
from cnn2gnn_dist.errors import UserError

KINDS = ("none", "shift", "crop_flip", "random_resized_crop")

CLEAN = -1
"""Number of the view without augmentation."""

ATTEMPTS = 10


@dataclass(frozen=True)
class ViewSpec:
    """What a view looks like.

    Attributes:
        kind: none, shift (pad and crop), crop_flip, random_resized_crop.
        size: side of the square view, in pixels.
        seed: of all draws.
        pad: zero padding before the crop, in pixels.
        scale, ratio: area share and aspect ratio of a random resized crop.
        flip: mirror half of the views left to right (never for ``shift``).
        resize: clean view: shorter side to size x this (1 or more), then the centre is cut.

    Raises:
        UserError: unknown kind, or a number out of range.
    """

    kind: str
    size: int
    seed: int = 0
    pad: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    resize: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"no kind of view {self.kind!r}", where="views.kind", remedy=", ".join(KINDS)
            )
        if self.size < 1 or self.pad < 0 or self.resize < 1:
            raise UserError(
                f"views of size {self.size}, pad {self.pad}, resize {self.resize}",
                where="views",
                remedy="size >= 1, pad >= 0, resize >= 1",
            )


class Boxes(NamedTuple):
    """Crops of N images: pixels (top and left may be negative: padding), and mirroring."""

    top_N: np.ndarray
    left_N: np.ndarray
    height_N: np.ndarray
    width_N: np.ndarray
    flip_N: np.ndarray


def boxes(
    spec: ViewSpec, ids_N: np.ndarray, heights_N: np.ndarray, widths_N: np.ndarray, view: int
) -> Boxes:
    """The crop of each image's view, in pixels of the image (for pad and crop: of the clean view)."""
    ids = np.asarray(ids_N, dtype=np.int64).astype(np.uint64)
    n, none = len(ids), np.zeros(len(ids), np.int64)
    if view == CLEAN or spec.kind == "none":
        return Boxes(none, none, none + spec.size, none + spec.size, np.zeros(n, bool))
    state = _state(spec.seed, ids, view)
    flip = (_draw(state, 0) < 0.5) & spec.flip & (spec.kind != "shift")
    if spec.kind == "random_resized_crop":
        heights, widths = np.asarray(heights_N, np.int64), np.asarray(widths_N, np.int64)
        return Boxes(*_resized_boxes(spec, state, heights, widths), flip)
    room = 2 * spec.pad + 1
    top = (_draw(state, 1) * room).astype(np.int64) - spec.pad
    left = (_draw(state, 2) * room).astype(np.int64) - spec.pad
    return Boxes(top, left, none + spec.size, none + spec.size, flip)


def render(spec: ViewSpec, image_HWC: np.ndarray, sample_id: int, view: int) -> np.ndarray:
    """One view [size, size, 3] uint8 of an image [H, W, 3] uint8.

    Raises:
        CorruptSample: an image so narrow that resizing its shorter side would fill the memory.
    """
    return render_batch(spec, [image_HWC], np.array([sample_id]), view)[0]


def render_batch(
    spec: ViewSpec, images: Sequence[np.ndarray], ids_N: np.ndarray, view: int
) -> np.ndarray:
    """The same views of N images of any sizes: [N, size, size, 3] uint8; draws made at once.

    Raises:
        CorruptSample: as :func:`render`.
    """
    made = np.empty((len(images), spec.size, spec.size, 3), np.uint8)
    if view == CLEAN or spec.kind == "none":
        for row, image in enumerate(images):
            made[row] = _clean(spec, image)
        return made
    heights, widths = ([image.shape[axis] for image in images] for axis in (0, 1))
    box = boxes(spec, ids_N, np.array(heights), np.array(widths), view)
    corners = zip(*(column.tolist() for column in box), strict=True)
    for row, (top, left, high, wide, flip) in enumerate(corners):
        target = made[row, :, ::-1] if flip else made[row]
        if spec.kind == "random_resized_crop":
            crop = images[row][top : top + high, left : left + wide]
            target[:] = _resized(crop, spec.size, spec.size)
        else:
            _shift_into(target, _clean(spec, images[row]), top, left)
    return made


def uniform(seed: int, ids: np.ndarray, view: int, draw: int) -> np.ndarray:
    """[N] float64 in [0, 1): a hash of (seed, id, view, draw), so no state is kept."""
    return _draw(_state(seed, np.asarray(ids).astype(np.uint64), view), draw)


def _state(seed: int, ids: np.ndarray, view: int) -> np.ndarray:
    """[N] uint64: the part of the hash that all draws of a view share."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + np.uint64(0x9E3779B97F4A7C15))
        return _mix(_mix(state ^ ids) ^ np.uint64(view & 0xFFFFFFFF))


def _draw(state: np.ndarray, draw: int) -> np.ndarray:
    return (_mix(state ^ np.uint64(draw)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """One step of splitmix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _resized_boxes(
    spec: ViewSpec, state_N: np.ndarray, heights_N: np.ndarray, widths_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """torchvision's rule: ten attempts at area and ratio, else the largest centred crop."""
    top, left, high, wide = np.zeros((4, len(state_N)), np.int64)
    open_M = np.arange(len(state_N))  # rows without a crop so far
    low, up = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for attempt in range(ATTEMPTS):
        if not len(open_M):
            break
        heights, widths = heights_N[open_M], widths_N[open_M]
        draws = [_draw(state_N[open_M], 10 + 4 * attempt + d) for d in range(4)]
        area = heights * widths * (spec.scale[0] + draws[0] * (spec.scale[1] - spec.scale[0]))
        ratio = np.exp(low + draws[1] * (up - low))
        w = np.round(np.sqrt(area * ratio)).astype(np.int64)
        h = np.round(np.sqrt(area / ratio)).astype(np.int64)
        fits = (w > 0) & (h > 0) & (w <= widths) & (h <= heights)
        found = open_M[fits]
        wide[found], high[found] = w[fits], h[fits]
        top[found] = (draws[2] * (heights - h + 1)).astype(np.int64)[fits]
        left[found] = (draws[3] * (widths - w + 1)).astype(np.int64)[fits]
        open_M = open_M[~fits]
    if len(open_M):
        heights, widths = heights_N[open_M], widths_N[open_M]
        shape = widths / heights
        w = np.where(shape > spec.ratio[1], np.round(heights * spec.ratio[1]), widths)
        h = np.where(shape < spec.ratio[0], np.round(widths / spec.ratio[0]), heights)
        # A ratio far from the image's may round to nothing.
        high[open_M], wide[open_M] = np.maximum(h, 1).astype(np.int64), np.maximum(w, 1)
        top[open_M] = (heights - high[open_M]) // 2
        left[open_M] = (widths - wide[open_M]) // 2
    return top, left, high, wide


def _clean(spec: ViewSpec, image_HWC: np.ndarray) -> np.ndarray:
    """Shorter side to size x resize, then the centre."""
    high, wide = image_HWC.shape[:2]
    short = round(spec.size * spec.resize)
    if min(high, wide) != short:
        if short * short * max(high, wide) > MAX_PIXELS * min(high, wide):
            raise CorruptSample(f"{wide} x {high} pixels are too narrow to be resized")
        if high <= wide:
            image_HWC = _resized(image_HWC, short, int(short * wide / high))
        else:
            image_HWC = _resized(image_HWC, int(short * high / wide), short)
    high, wide = image_HWC.shape[:2]
    top, left = round((high - spec.size) / 2.0), round((wide - spec.size) / 2.0)
    return np.ascontiguousarray(image_HWC[top : top + spec.size, left : left + spec.size])


def _resized(image_HWC: np.ndarray, high: int, wide: int) -> np.ndarray:
    if image_HWC.shape[:2] == (high, wide):
        return np.ascontiguousarray(image_HWC)
    tensor = torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1)[None]
    made = F.interpolate(tensor, (high, wide), mode="bilinear", antialias=True)
    return made[0].permute(1, 2, 0).contiguous().numpy()


def _shift_into(target: np.ndarray, image_HWC: np.ndarray, top: int, left: int) -> None:
    """Fill ``target`` with the window of its size at (top, left) of the image, zeros outside."""
    high, wide = image_HWC.shape[:2]
    if top or left:
        target[:] = 0
    h, w = max(high - abs(top), 0), max(wide - abs(left), 0)
    to_y, to_x = max(-top, 0), max(-left, 0)
    from_y, from_x = max(top, 0), max(left, 0)
    target[to_y : to_y + h, to_x : to_x + w] = image_HWC[from_y : from_y + h, from_x : from_x + w]
