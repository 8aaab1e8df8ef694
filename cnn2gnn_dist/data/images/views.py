"""Views: augmentation as a pure function of (seed, sample id, view number).

The result is bit-identical to torchvision's transforms v2 on tensors (resize: bilinear, antialiased).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cnn2gnn_dist.data.images.decode import MAX_PIXELS, CorruptSample
from cnn2gnn_dist.data.images.distort import LEVELS, Color, cutout, randaugment
from cnn2gnn_dist.data.images.hooks import apply, hook_of
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.splitmix import GOLDEN, mixed

if TYPE_CHECKING:  # takes two seconds to import, and readers of small images need none of it
    import torch

KINDS = ("none", "shift", "crop_flip", "random_resized_crop")

CLEAN = -1
"""View number of the view without augmentation."""

ATTEMPTS = 10

_OWN = -2  # "view number" of what all views of a sample share
_CUTOUT, _HOOK, _RANDAUGMENT = 60, 70, 100  # first draws


@dataclass(frozen=True)
class ViewSpec:
    """Specification of a view.

    Attributes:
        kind: none, shift (pad and crop), crop_flip, random_resized_crop.
        size: side of the square view, in pixels.
        seed: seed of all random draws.
        pad: padding before the crop, in pixels, with zeros or ``reflect``: mirrored at the border.
        scale, ratio: area fraction and aspect ratio of a random resized crop.
        flip: mirror half of the views left to right (never for ``shift``).
        alternating: mirror every second view of a sample, half of the samples in even views (Keller Jordan,
            "94% on CIFAR-10 in 3.29 seconds", 2024); false: each view with a probability of one half.
        cutout: side of a square that is overwritten with ``fill``, in pixels; 0: none.
        randaugment: number of RandAugment's operations, of this ``magnitude`` (0 to 30).
        fill: color of the cutout square and of areas that RandAugment leaves empty.
        hook: another library's transform on finished views (``hooks.hook_of``); "": none.
        resize: clean view: resize the shorter side to size x this (1 or more), then crop the center.

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
    reflect: bool = False
    alternating: bool = False
    cutout: int = 0
    randaugment: int = 0
    magnitude: int = 9
    fill: Color = (0, 0, 0)
    hook: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"unknown kind of view {self.kind!r}",
                where="views.kind",
                remedy=f"use {', '.join(KINDS)}",
            )
        if self.size < 1 or self.pad < 0 or self.resize < 1:
            raise UserError(
                f"views of size {self.size}, pad {self.pad}, resize {self.resize}",
                where="views",
                remedy="use size >= 1, pad >= 0, resize >= 1",
            )
        if self.cutout < 0 or self.randaugment < 0 or not 0 <= self.magnitude <= LEVELS:
            raise UserError(
                f"cutout {self.cutout}, randaugment {self.randaugment}, magnitude {self.magnitude}",
                where="views",
                remedy=f"use cutout >= 0, randaugment >= 0, magnitude from 0 to {LEVELS}",
            )
        if self.hook:
            hook_of(self.hook, self.size, self.fill)

    @property
    def distorts(self) -> bool:
        """Whether finished views are distorted further."""
        return bool(self.cutout or self.randaugment or self.hook)

    @property
    def short(self) -> int:
        """Shorter side, in pixels, of the resized image from which the clean view is cropped."""
        return round(self.size * self.resize)


class Boxes(NamedTuple):
    """Crops of N images in pixels (negative top or left means padding), and whether to mirror them."""

    top_N: np.ndarray
    left_N: np.ndarray
    height_N: np.ndarray
    width_N: np.ndarray
    flip_N: np.ndarray


def boxes(
    spec: ViewSpec, ids_N: np.ndarray, heights_N: np.ndarray, widths_N: np.ndarray, view: int
) -> Boxes:
    """Return the crop of each image's view, in pixels of the image (for pad and crop: of the clean view)."""
    ids = np.asarray(ids_N, dtype=np.int64).astype(np.uint64)
    n, none = len(ids), np.zeros(len(ids), np.int64)
    if view == CLEAN or spec.kind == "none":
        return Boxes(none, none, none + spec.size, none + spec.size, np.zeros(n, bool))
    state = _state(spec.seed, ids, view)
    if spec.kind == "random_resized_crop":
        heights, widths = np.asarray(heights_N, np.int64), np.asarray(widths_N, np.int64)
        flip = _flips(spec, ids, view, _draw(state, 0)) & spec.flip
        return Boxes(*_resized_boxes(spec, state, heights, widths), flip)
    draws_3N = _draw(state, np.arange(3)[:, None])
    flip = _flips(spec, ids, view, draws_3N[0]) & spec.flip & (spec.kind != "shift")
    top, left = (draws_3N[1:] * (2 * spec.pad + 1)).astype(np.int64) - spec.pad
    return Boxes(top, left, none + spec.size, none + spec.size, flip)


def render(spec: ViewSpec, image_HWC: np.ndarray, sample_id: int, view: int) -> np.ndarray:
    """Return one view [size, size, 3] uint8 of an image [H, W, 3] uint8.

    Raises:
        CorruptSample: the image is so narrow that resizing its shorter side would fill the memory.
    """
    return render_batch(spec, [image_HWC], np.array([sample_id]), view)[0]


def render_batch(
    spec: ViewSpec, images: Sequence[np.ndarray], ids_N: np.ndarray, view: int
) -> np.ndarray:
    """Return the same views of N images of any sizes, [N, size, size, 3] uint8; draws are vectorized.

    Raises:
        CorruptSample: as :func:`render`.
    """
    made = np.empty((len(images), spec.size, spec.size, 3), np.uint8)
    if view == CLEAN or spec.kind != "random_resized_crop":
        for row, image in enumerate(images):
            clean_into(spec, made[row], image)
        return shifted(spec, made, ids_N, view)
    heights, widths = ([image.shape[axis] for image in images] for axis in (0, 1))
    box = boxes(spec, ids_N, np.array(heights), np.array(widths), view)
    corners = zip(*(column.tolist() for column in box), strict=True)
    for row, (top, left, high, wide, flip) in enumerate(corners):
        resized_into(made[row], images[row][top : top + high, left : left + wide], flip)
    return distorted(spec, made, ids_N, view)


def clean_into(spec: ViewSpec, target_HWC: np.ndarray, image_HWC: np.ndarray) -> None:
    """Write the clean view of an image: resize the shorter side to size x resize, then crop the center.

    Raises:
        CorruptSample: as :func:`render`.
    """
    high, wide = image_HWC.shape[:2]
    short = spec.short
    if min(high, wide) != short:
        if short * short * max(high, wide) > MAX_PIXELS * min(high, wide):
            raise CorruptSample(f"{wide} x {high} pixels, too narrow to resize")
        if high <= wide:
            image_HWC = _resized(image_HWC, short, int(short * wide / high))
        else:
            image_HWC = _resized(image_HWC, int(short * high / wide), short)
    high, wide = image_HWC.shape[:2]
    top, left = round((high - spec.size) / 2.0), round((wide - spec.size) / 2.0)
    target_HWC[:] = image_HWC[top : top + spec.size, left : left + spec.size]


def resized_into(target_HWC: np.ndarray, image_HWC: np.ndarray, flip: bool = False) -> None:
    """Write an image resized to the target's size and optionally mirrored; both uint8."""
    from torch.nn import functional as F  # two seconds, which readers of small images don't need

    made = _as_batch(image_HWC)
    if image_HWC.shape != target_HWC.shape:
        made = F.interpolate(made, target_HWC.shape[:2], mode="bilinear", antialias=True)
    # torch's flip is ten times as fast as numpy's copy from a reversed view.
    _as_batch(target_HWC).copy_(made.flip(3) if flip else made)


def shifted(spec: ViewSpec, clean_NHWC: np.ndarray, ids_N: np.ndarray, view: int) -> np.ndarray:
    """Pad, crop and mirror clean views into views [N, size, size, 3].

    Returns the array itself if the view is the clean one. Not for random resized crops.
    """
    if view == CLEAN or spec.kind == "none":
        return clean_NHWC
    n, size = len(clean_NHWC), spec.size
    box = boxes(spec, ids_N, np.full(n, size), np.full(n, size), view)
    pad = min(spec.pad, size)  # beyond that, the crop contains no part of the image
    wide = size + 2 * pad
    if spec.reflect:
        around = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        padded = np.pad(clean_NHWC, around, mode="reflect")
    else:
        padded = np.zeros((n, wide, wide, 3), np.uint8)
        padded[:, pad : pad + size, pad : pad + size] = clean_NHWC
    # Each row of a view, at each possible start, is one array element, so it is copied by memcpy.
    lines = np.ndarray(
        (n, wide, 2 * pad + 1), f"V{3 * size}", padded, strides=(wide * wide * 3, wide * 3, 3)
    )
    tops = box.top_N.clip(-pad, pad)[:, None] + pad + np.arange(size)
    made = lines[np.arange(n)[:, None], tops, box.left_N.clip(-pad, pad)[:, None] + pad]
    pixels_NHW = made[..., None].view("V3")
    pixels_NHW[box.flip_N] = pixels_NHW[box.flip_N, :, ::-1]
    return distorted(spec, pixels_NHW.view(np.uint8).reshape(n, size, size, 3), ids_N, view)


def distorted(spec: ViewSpec, images_NHWC: np.ndarray, ids_N: np.ndarray, view: int) -> np.ndarray:
    """RandAugment, the hook and cutout on finished views, in place; returns the array."""
    if not spec.distorts:
        return images_NHWC
    state_N = _state(spec.seed, np.asarray(ids_N, np.int64).astype(np.uint64), view)
    if spec.randaugment:
        draws_KN = _draw(state_N, (_RANDAUGMENT + np.arange(2 * spec.randaugment))[:, None])
        draws_NK2 = draws_KN.T.reshape(len(images_NHWC), -1, 2)
        for image, draws_K2 in zip(images_NHWC, draws_NK2, strict=True):
            image[:] = randaugment(image, draws_K2, spec.magnitude, spec.fill)
    if spec.hook:
        hook = hook_of(spec.hook, spec.size, spec.fill)
        seeds_N = _mix(state_N ^ np.uint64(_HOOK)) >> np.uint64(1)
        for image, seed in zip(images_NHWC, seeds_N.tolist(), strict=True):
            image[:] = apply(hook, image, seed)
    if spec.cutout:
        draws_2N = _draw(state_N, (_CUTOUT + np.arange(2))[:, None])
        cutout(images_NHWC, draws_2N, spec.cutout, spec.fill)
    return images_NHWC


def _flips(spec: ViewSpec, ids: np.ndarray, view: int, draw_N: np.ndarray) -> np.ndarray:
    """Which views are mirrored, if any may be."""
    if not spec.alternating:
        return draw_N < 0.5
    return (_draw(_state(spec.seed, ids, _OWN), 0) < 0.5) ^ bool(view & 1)


def uniform(seed: int, ids: np.ndarray, view: int, draw: int) -> np.ndarray:
    """Return [N] float64 in [0, 1), a stateless hash of (seed, id, view, draw)."""
    return _draw(_state(seed, np.asarray(ids).astype(np.uint64), view), draw)


def _state(seed: int, ids: np.ndarray, view: int) -> np.ndarray:
    """Return [N] uint64, the part of the hash that all draws of a view share."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + GOLDEN)
        return _mix(_mix(state ^ ids) ^ np.uint64(view & 0xFFFFFFFF))


def _draw(state: np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    return (_mix(state ^ np.asarray(draw).astype(np.uint64)) >> np.uint64(11)).astype(
        np.float64
    ) * 2.0**-53


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """One step of splitmix64."""
    return mixed(np.asarray(x, dtype=np.uint64) + GOLDEN)


def _resized_boxes(
    spec: ViewSpec, state_N: np.ndarray, heights_N: np.ndarray, widths_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw boxes by torchvision's rule: ten attempts at area and ratio, else the largest center crop."""
    draws = 10 + 4 * np.arange(ATTEMPTS)[:, None] + np.arange(4)
    u_4AN = _draw(state_N, np.ascontiguousarray(draws.T)[..., None])
    low, up = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    area = heights_N * widths_N * (spec.scale[0] + u_4AN[0] * (spec.scale[1] - spec.scale[0]))
    ratio = np.exp(low + u_4AN[1] * (up - low))
    wide_AN = np.round(np.sqrt(area * ratio)).astype(np.int64)
    high_AN = np.round(np.sqrt(area / ratio)).astype(np.int64)
    fits_AN = (wide_AN > 0) & (high_AN > 0) & (wide_AN <= widths_N) & (high_AN <= heights_N)
    first = fits_AN.argmax(axis=0), np.arange(len(state_N))
    high, wide = high_AN[first], wide_AN[first]
    top = (u_4AN[2][first] * (heights_N - high + 1)).astype(np.int64)
    left = (u_4AN[3][first] * (widths_N - wide + 1)).astype(np.int64)
    none = ~fits_AN[first]
    if none.any():
        heights, widths = heights_N[none], widths_N[none]
        shape = widths / heights
        w = np.where(shape > spec.ratio[1], np.round(heights * spec.ratio[1]), widths)
        h = np.where(shape < spec.ratio[0], np.round(widths / spec.ratio[0]), heights)
        # A ratio far from the image's may round to zero.
        high[none], wide[none] = np.maximum(h, 1).astype(np.int64), np.maximum(w, 1)
        top[none], left[none] = (heights - high[none]) // 2, (widths - wide[none]) // 2
    return top, left, high, wide


def _resized(image_HWC: np.ndarray, high: int, wide: int) -> np.ndarray:
    made = np.empty((high, wide, 3), np.uint8)
    resized_into(made, image_HWC)
    return made


def _as_batch(image_HWC: np.ndarray) -> torch.Tensor:
    """View an image as [1, 3, H, W] over the same bytes.

    With this order of steps torch recognizes the memory as channels-last, and does not transpose it
    before or after interpolation.
    """
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(image_HWC))
    return tensor.unsqueeze(0).permute(0, 3, 1, 2)
