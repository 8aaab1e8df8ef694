"""Image bytes to RGB pixels: simplejpeg for JPEG, Pillow for whatever else an image may be."""

from __future__ import annotations

import io

import numpy as np

from cnn2gnn_dist.data.images.formats import KINDS, image_suffix, what_it_is
from cnn2gnn_dist.data.images.pixels import CorruptSample, rgb

__all__ = ["DECODING", "MAX_PIXELS", "CorruptSample", "decode", "decode_crop", "jpeg_size"]

DECODING = 1
"""Version of what comes out, in the keys of the stages that read images. To be raised when any
image gets other pixels, or is found corrupt where it was not: finished runs are then stale."""

MAX_PIXELS = 89_478_485
"""Larger images are refused: a small file can unfold to fill the memory. Pillow's own limit,
above which it would warn, and above twice of which raise."""

MAX_WORK = 32 * MAX_PIXELS
"""Most pixels times scans of a JPEG: a file of a megabyte can ask for hours of passes."""

TILE_WIDTH, TILE_HEIGHT = 322, 323


def decode(data: bytes, into_HWC: np.ndarray | None = None) -> np.ndarray:
    """Pixels [H, W, 3] uint8, RGB, of an image of any kind: docs/images.md says what becomes of each.

    Transparency lies on white; EXIF orientation is not applied, as in torchvision. ``into_HWC``
    (contiguous) is filled and returned if it has the image's shape and the image is a JPEG; it may
    be left half written.

    Raises:
        CorruptSample: truncated, no image, too large, or of numbers that do not say what is white.
    """
    size = jpeg_size(data)
    if size is None:
        return _by_pillow(data)
    return _jpeg(data, into_HWC if into_HWC is not None and into_HWC.shape[:2] == size else None)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG of a kind that :func:`decode_crop` cuts; None: decode it to know.

    Raises:
        CorruptSample: too large.
    """
    if data[:2] != b"\xff\xd8":
        return None
    import simplejpeg

    try:
        high, wide, space, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # no header, or a sound one of rare chroma: Pillow can tell
        return None
    _check_size(wide, high)
    _check_scans(data, wide, high)
    return None if space in ("CMYK", "YCCK") else (high, wide)


def _check_scans(data: bytes, wide: int, high: int) -> None:
    if high * wide * len(data) > MAX_WORK and not _in_one_scan(data):  # else no room for so many
        scans = data.count(b"\xff\xda")
        if high * wide * scans > MAX_WORK:
            raise CorruptSample(f"{wide} x {high} pixels in {scans} scans")


def _in_one_scan(data: bytes) -> bool:
    """Whether a JPEG is surely sequential with all colours in its first scan, hence its only one.

    Walks the few segments of its header: looking for markers in all of it takes twenty times as long.
    """
    colours, at = 0, 2
    while data[at : at + 1] == b"\xff" and at + 10 < len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xC0 or marker == 0xC1:
            colours = data[at + 9]
        elif marker == 0xDA:
            return data[at + 4] == colours
        elif not (0xE0 <= marker <= 0xFE or marker in (0xC4, 0xDB, 0xDD)):
            return False
        at += 2 + length
    return False


def decode_crop(
    data: bytes, size: tuple[int, int], top: int, left: int, high: int, wide: int
) -> np.ndarray:
    """Rows [top, top + high) and columns [left, left + wide) of a JPEG of a known ``size``.

    The pixels [high, wide, 3] of decoding it whole, in less time where the extra is built
    (:mod:`cnn2gnn_dist.data.images.partial`).

    Raises:
        CorruptSample: as :func:`decode`; with the extra, damage below the crop may stay unseen.
    """
    from cnn2gnn_dist.data.images import partial  # here: it is also run by its name

    crop = partial.crop(data, *size, top, left, high, wide)
    return _jpeg(data)[top : top + high, left : left + wide] if crop is None else crop


def _jpeg(data: bytes, into_HWC: np.ndarray | None = None) -> np.ndarray:
    import simplejpeg

    try:
        made = simplejpeg.decode_jpeg(data, "RGB", buffer=into_HWC, strict=True)
    except ValueError as error:
        raise CorruptSample(str(error)) from None
    return made if into_HWC is None else into_HWC


def _by_pillow(data: bytes) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        _check_size(*_webp_canvas(data))
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            _check_size(*image.size)
            if data[:2] == b"\xff\xd8":
                _check_scans(data, *image.size)
            if image.format == "TIFF":  # a tile may be larger than its image
                tags = image.tag_v2  # type: ignore[attr-defined]
                _check_size(tags.get(TILE_WIDTH, 0), tags.get(TILE_HEIGHT, 0))
            return rgb(image)
    except CorruptSample:
        raise
    except UnidentifiedImageError:
        raise CorruptSample(_not_opened(data)) from None
    except Exception as error:
        raise CorruptSample(f"{type(error).__name__}: {error}") from None


def _not_opened(data: bytes) -> str:
    kind = image_suffix(data)
    if kind is None:
        return what_it_is(data)
    return f"{kind.upper()} of a rare kind that is not read, or with damage in its header"


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP (0, 0 of others): opening it alone takes memory for all of it."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0, 0
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    lossless = data[12:16] == b"VP8L"
    sides = int.from_bytes(data[21:25] if lossless else data[26:30], "little")
    shift = 14 if lossless else 16
    return (sides & 0x3FFF) + lossless, (sides >> shift & 0x3FFF) + lossless


def _check_size(wide: int, high: int) -> None:
    if wide * high > MAX_PIXELS:
        raise CorruptSample(f"{wide} x {high} pixels are more than {MAX_PIXELS}")
