"""Views: augmentation as a pure function of (seed, sample id, view number).

The bytes equal torchvision's transforms v2 on tensors (resize: bilinear, antialiased).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

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
        resize: clean view: shorter side to size x this, then the centre is cut.
    """

    kind: str
    size: int
    seed: int = 0
    pad: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    resize: float = 1.0


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
    ids = np.asarray(ids_N, dtype=np.uint64)
    heights, widths = np.asarray(heights_N, np.int64), np.asarray(widths_N, np.int64)
    flip = (uniform(spec.seed, ids, view, 0) < 0.5) & spec.flip & (spec.kind != "shift")
    if spec.kind == "random_resized_crop":
        top, left, high, wide = _resized_boxes(spec, ids, heights, widths, view)
    else:
        room = 2 * spec.pad + 1
        top = (uniform(spec.seed, ids, view, 1) * room).astype(np.int64) - spec.pad
        left = (uniform(spec.seed, ids, view, 2) * room).astype(np.int64) - spec.pad
        high = wide = np.full(len(ids), spec.size, np.int64)
    return Boxes(top, left, high, wide, flip)


def render(spec: ViewSpec, image_HWC: np.ndarray, sample_id: int, view: int) -> np.ndarray:
    """One view [size, size, 3] uint8 of an image [H, W, 3] uint8."""
    if view == CLEAN or spec.kind == "none":
        return _clean(spec, image_HWC)
    one = np.array([sample_id], dtype=np.uint64)
    if spec.kind == "random_resized_crop":
        high, wide = image_HWC.shape[:2]
        box = boxes(spec, one, np.array([high]), np.array([wide]), view)
        top, left = int(box.top_N[0]), int(box.left_N[0])
        crop = image_HWC[top : top + int(box.height_N[0]), left : left + int(box.width_N[0])]
        made = _resized(crop, spec.size, spec.size)
    else:
        image = _clean(spec, image_HWC)
        box = boxes(spec, one, np.array([spec.size]), np.array([spec.size]), view)
        made = _shifted(image, int(box.top_N[0]), int(box.left_N[0]))
    return np.ascontiguousarray(made[:, ::-1]) if box.flip_N[0] else made


def uniform(seed: int, ids: np.ndarray, view: int, draw: int) -> np.ndarray:
    """[N] float64 in [0, 1): a hash of (seed, id, view, draw), so no state is kept."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state ^ ids)
        state = _mix(state ^ np.uint64(view & 0xFFFFFFFF))
        state = _mix(state ^ np.uint64(draw))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """One step of splitmix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _resized_boxes(
    spec: ViewSpec, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, view: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """torchvision's rule: ten attempts at area and ratio, else the largest centred crop."""
    n = len(ids)
    top, left = np.zeros(n, np.int64), np.zeros(n, np.int64)
    high, wide = np.zeros(n, np.int64), np.zeros(n, np.int64)
    open_N = np.ones(n, bool)
    low, up = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for attempt in range(ATTEMPTS):
        draws = [uniform(spec.seed, ids, view, 10 + 4 * attempt + d) for d in range(4)]
        area = heights * widths * (spec.scale[0] + draws[0] * (spec.scale[1] - spec.scale[0]))
        ratio = np.exp(low + draws[1] * (up - low))
        w = np.round(np.sqrt(area * ratio)).astype(np.int64)
        h = np.round(np.sqrt(area / ratio)).astype(np.int64)
        fits = open_N & (w > 0) & (h > 0) & (w <= widths) & (h <= heights)
        wide[fits], high[fits] = w[fits], h[fits]
        top[fits] = (draws[2] * (heights - h + 1)).astype(np.int64)[fits]
        left[fits] = (draws[3] * (widths - w + 1)).astype(np.int64)[fits]
        open_N &= ~fits
    if open_N.any():
        shape = widths / heights
        w = np.where(shape > spec.ratio[1], np.round(heights * spec.ratio[1]), widths)
        h = np.where(shape < spec.ratio[0], np.round(widths / spec.ratio[0]), heights)
        wide[open_N], high[open_N] = w.astype(np.int64)[open_N], h.astype(np.int64)[open_N]
        top[open_N] = ((heights - high) // 2)[open_N]
        left[open_N] = ((widths - wide) // 2)[open_N]
    return top, left, high, wide


def _clean(spec: ViewSpec, image_HWC: np.ndarray) -> np.ndarray:
    """Shorter side to size x resize, then the centre."""
    high, wide = image_HWC.shape[:2]
    short = round(spec.size * spec.resize)
    if min(high, wide) != short:
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


def _shifted(image_HWC: np.ndarray, top: int, left: int) -> np.ndarray:
    """The window of the image's own size that starts at (top, left), zeros outside."""
    high, wide = image_HWC.shape[:2]
    made = np.zeros_like(image_HWC)
    to_y, to_x = max(-top, 0), max(-left, 0)
    from_y, from_x = max(top, 0), max(left, 0)
    h, w = high - abs(top), wide - abs(left)
    if h > 0 and w > 0:
        made[to_y : to_y + h, to_x : to_x + w] = image_HWC[from_y : from_y + h, from_x : from_x + w]
    return made
