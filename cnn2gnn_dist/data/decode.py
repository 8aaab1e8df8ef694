"""Image bytes to RGB pixels: simplejpeg for JPEG, Pillow for whatever else an image may be."""

from __future__ import annotations

import io

import numpy as np

MAX_PIXELS = 89_478_485
"""Larger images are refused: a small file can unfold to fill the memory. Pillow's own limit,
above which it would warn, and above twice of which raise."""


class CorruptSample(Exception):
    """The bytes are no whole image."""


def decode(data: bytes) -> np.ndarray:
    """Pixels [H, W, 3] uint8, RGB. Grey, CMYK, palette and PNG-named-.jpg images are converted.

    EXIF orientation is not applied, as in torchvision.

    Raises:
        CorruptSample: truncated, no image, or too large.
    """
    if data[:2] == b"\xff\xd8":
        import simplejpeg

        try:
            high, wide, space, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(wide, high)
            if space != "CMYK" and space != "YCCK":
                return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError as error:
            raise CorruptSample(str(error)) from None
    return _by_pillow(data)


def _by_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size)
            if image.mode == "P" and "transparency" in image.info:  # else Pillow warns
                return np.array(image.convert("RGBA").convert("RGB"))
            return np.array(image.convert("RGB"))
    except CorruptSample:
        raise
    except Exception as error:
        raise CorruptSample(f"{type(error).__name__}: {error}") from None


def _check_size(wide: int, high: int) -> None:
    if wide * high > MAX_PIXELS:
        raise CorruptSample(f"{wide} x {high} pixels are more than {MAX_PIXELS}")
