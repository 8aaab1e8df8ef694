"""Conversion of Pillow's decoded images to 8-bit RGB; docs/images.md has the rules.

Pillow's own conversions clip images of more than 8 bits to white, and drop transparency, so that a
drawing becomes a black square. They are used only where they are correct.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.TiffImagePlugin import TiffImageFile

BLOCK = 1 << 20
"""Pixels converted at a time, so that no second copy of a large image is made."""

_BITS, _COMPRESSION, _PHOTOMETRIC, _STRIP_BYTES, _SAMPLE_FORMAT = 258, 259, 262, 279, 339
_SAMPLES, _PLANES = 277, 284
_WHITE_IS_ZERO, _YCBCR, _SIGNED, _PLAIN, _PLANE_BY_PLANE = 0, 6, 2, 1, 2


class CorruptSample(Exception):
    """The bytes are not a complete image, or its pixels are ambiguous."""


def rgb(image: Image) -> np.ndarray:
    """Convert an image opened by Pillow to pixels [H, W, 3] uint8, composited on white.

    Raises:
        CorruptSample: its numbers do not define black and white.
        Exception: any of many Pillow exceptions, if the bytes are corrupt.
    """
    inverted = _check_tiff(cast("TiffImageFile", image)) if image.format == "TIFF" else False
    if image.mode == "RGB" and "transparency" not in image.info and image.format != "GIF":
        return np.array(image)
    tile = image.tile[0] if image.tile else None  # type: ignore[attr-defined]
    image.load()
    if image.format == "PNG" and tile is not None:
        _rescale_transparency(image, tile[3])
    if image.mode.startswith("I"):
        made = _deep_grey(image)
    elif image.mode == "F":
        made = _float_grey(np.asarray(image))
    elif image.has_transparency_data or image.mode == "La":
        made = _on_white(image)
    else:
        made = np.array(image.convert("RGB"))
    if inverted:
        np.subtract(255, made, out=made)
    if image.format == "GIF" and tile is not None:  # the first frame may be smaller than the canvas
        left, top, right, bottom = tile[1]
        for outside in (made[:top], made[bottom:], made[:, :left], made[:, right:]):
            outside[:] = 255
    return made


def _check_tiff(image: TiffImageFile) -> bool:
    """Refuse TIFFs that Pillow misreads; return True if zero is white and Pillow does not invert it."""
    tags = image.tag_v2
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise CorruptSample("a TIFF with signed samples, whose black level is undefined")
    if image.mode == "I":
        raise CorruptSample("a TIFF with 32-bit integer samples, whose white level is undefined")
    if tags.get(_PHOTOMETRIC) == _YCBCR and tags.get(_COMPRESSION, _PLAIN) == _PLAIN:
        wide, high = image.size
        if sum(tags.get(_STRIP_BYTES, (wide * high * 3,))) != wide * high * 3:
            raise CorruptSample("an uncompressed YCbCr TIFF with subsampled chroma")
    planes = tags.get(_PLANES) == _PLANE_BY_PLANE and tags.get(_SAMPLES, 1) > 1
    if planes and tags.get(_COMPRESSION, _PLAIN) == _PLAIN and max(tags.get(_BITS, (1,))) > 8:
        # Pillow treats each byte of a plane as a pixel, so the low bytes become pixels too.
        raise CorruptSample("an uncompressed TIFF with 16 bits per channel, stored plane by plane")
    return tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and image.mode in ("I;16", "I;16B", "F")


def _rescale_transparency(image: Image, layout: str) -> None:
    """Rescale the transparent color to the scale of the pixels; Pillow keeps the value in the file."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple):
        if "16" in layout:
            raise CorruptSample("a PNG with 16 bits per channel and one transparent color")
        image.info["transparency"] = tuple(value & 255 for value in colour)
    elif isinstance(colour, int) and image.mode == "L":
        most = {"L;2": 3, "L;4": 15}.get(layout, 255)
        image.info["transparency"] = (colour & most) * 255 // most


def _deep_grey(image: Image) -> np.ndarray:
    """Convert 9 to 16-bit gray to its upper 8 bits, as Pillow and libpng do for 16-bit colors."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0] if image.format == "TIFF" else 16
    clear = image.info.get("transparency")

    def upper(rows: np.ndarray) -> np.ndarray:
        made = (rows >> (bits - 8)).astype(np.uint8)
        if isinstance(clear, int):
            made[rows == clear] = 255
        return made

    return _by_blocks(np.asarray(image), upper)


def _float_grey(grey_HW: np.ndarray) -> np.ndarray:
    """Convert float gray, in the range 0 to 1, or 0 to 255 if any value exceeds 1."""
    low, top = float(grey_HW.min()), float(grey_HW.max())  # NaN if any value is NaN
    if not (low >= 0 and top <= 255):
        raise CorruptSample(f"floats from {low:.6g} to {top:.6g}, neither 0 to 1 nor 0 to 255")
    factor = np.float32(255 if top <= 1 else 1)
    return _by_blocks(grey_HW, lambda rows: np.rint(rows * factor).astype(np.uint8))


def _by_blocks(grey_HW: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    high, wide = grey_HW.shape
    made = np.empty((high, wide, 3), np.uint8)
    step = max(1, BLOCK // wide)
    for top in range(0, high, step):
        made[top : top + step] = convert(grey_HW[top : top + step])[..., None]
    return made


def _on_white(image: Image) -> np.ndarray:
    """Composite the image on white by its alpha channel, as a viewer with a white page does."""
    from PIL import Image as pillow

    colours = image.convert("LA") if image.mode == "La" else image
    colours = colours.convert("RGBA")
    alpha = colours.getchannel("A")
    low, top = alpha.getextrema()
    if low == 255 or (top == 0 and image.format in ("BMP", "DIB")):  # a BMP's unused fourth byte
        return np.array(colours.convert("RGB"))
    page = pillow.new("RGB", colours.size, "white")
    page.paste(colours, mask=alpha)
    return np.array(page)
