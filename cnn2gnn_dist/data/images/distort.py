"""Distortions of finished views: cutout and RandAugment, given their random draws. In place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LEVELS = 30
"""The largest magnitude of RandAugment."""
Color = tuple[int, int, int]


def cutout(images_NHWC: np.ndarray, draws_2N: np.ndarray, side: int, fill: Color) -> None:
    """Overwrite a square of ``side`` pixels in each image with ``fill``.

    Its center is any pixel, so it may extend beyond the image (DeVries and Taylor, 2017). ``draws_2N``: 0 to 1, the
    center's row and column.
    """
    high, wide = images_NHWC.shape[1:3]
    places = []
    for draw_N, length in zip(draws_2N, (high, wide), strict=True):
        first_N1 = ((draw_N * length).astype(np.int64) - side // 2)[:, None]
        pixels = np.arange(length)
        places.append((pixels >= first_N1) & (pixels < first_N1 + side))
    images_NHWC[places[0][:, :, None] & places[1][:, None, :]] = fill


def randaugment(
    image_HWC: np.ndarray, draws_K2: np.ndarray, magnitude: int, fill: Color
) -> np.ndarray:
    """Apply operations in sequence to an image uint8 [H, W, 3]; the same as torchvision's on PIL images.

    Cubuk et al., "RandAugment", NeurIPS 2020. ``draws_K2``: for each of K operations its choice and its sign,
    0 to 1; ``magnitude`` 0 to 30.
    """
    image = Image.fromarray(np.ascontiguousarray(image_HWC))
    for which, sign in draws_K2.tolist():
        name = OPERATIONS[int(which * len(OPERATIONS))]
        image = operate(image, name, magnitude, -1.0 if sign < 0.5 else 1.0, fill)
    return np.asarray(image)


def operate(image: Image.Image, name: str, magnitude: int, sign: float, fill: Color) -> Image.Image:
    """Apply one of ``OPERATIONS`` to an image; ``sign`` 1 or -1, if it has one."""
    share = magnitude / LEVELS
    if name in _ENHANCES:
        return _ENHANCES[name](image).enhance(1.0 + sign * 0.9 * share)
    if name == "rotate":
        return image.rotate(sign * 30.0 * share, Image.Resampling.NEAREST, fillcolor=fill)
    if name in _MOVES:
        moved = _MOVES[name](sign * share, image.width, image.height)
        how = (Image.Transform.AFFINE, moved, Image.Resampling.NEAREST)
        return image.transform(image.size, *how, fillcolor=fill)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(4 * share))
    if name == "solarize":
        return ImageOps.solarize(image, 255 * (1.0 - share))  # type: ignore[arg-type]
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    return image


Matrix = tuple[float, float, float, float, float, float]
_ENHANCES: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
_MOVES: dict[str, Callable[[float, int, int], Matrix]] = {  # from a pixel to where it comes from
    "shear_x": lambda share, wide, high: (1, 0.3 * share, 0, 0, 1, 0),
    "shear_y": lambda share, wide, high: (1, 0, 0, 0.3 * share, 1, 0),
    "translate_x": lambda share, wide, high: (1, 0, -int(150 / 331 * wide * share), 0, 1, 0),
    "translate_y": lambda share, wide, high: (1, 0, 0, 0, 1, -int(150 / 331 * high * share)),
}
OPERATIONS = (
    *("identity", *_MOVES, "rotate", *_ENHANCES),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
"""The names of RandAugment's operations, equally likely."""
