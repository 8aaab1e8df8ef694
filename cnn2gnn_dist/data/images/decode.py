"""Image bytes to RGB pixels: simplejpeg for JPEG, Pillow for all other formats."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from cnn2gnn_dist.data.images.file_kind import ENOUGH, kind_of
from cnn2gnn_dist.data.images.formats import KINDS, image_suffix, what_it_is
from cnn2gnn_dist.data.images.pixels import CorruptSample, rgb

__all__ = [
    "DECODING",
    "MAX_PIXELS",
    "CorruptSample",
    "decode",
    "decode_crop",
    "image_size",
    "jpeg_size",
]

DECODING = 1
"""Version of the decoder's output, part of the keys of the stages that read images. Raise it when the
pixels of any image change, or an image is newly found corrupt: finished runs are then stale."""

MAX_PIXELS = 89_478_485
"""Larger images are refused: a small file can decompress to fill the memory. This is Pillow's limit,
above which it warns, and above twice of which it raises."""

PNG = b"\x89PNG\r\n\x1a\n"

MAX_WORK = 32 * MAX_PIXELS
"""Maximum pixels times scans of a JPEG: a file of a megabyte can demand hours of passes."""

NO_IMAGE = ", not an image"
"""End of the reason where the bytes are those of another kind of file."""

TILE_WIDTH, TILE_HEIGHT = 322, 323

T = TypeVar("T")


def decode(data: bytes, into_HWC: np.ndarray | None = None) -> np.ndarray:
    """Decode an image of any supported kind to RGB pixels [H, W, 3] uint8; docs/images.md has the rules.

    Transparent images are composited on white; EXIF orientation is not applied, as in torchvision.
    ``into_HWC`` (contiguous) is filled and returned if it has the image's shape and the image is a
    JPEG; on an error it may be half written.

    Raises:
        CorruptSample: truncated, not an image, too large, or with numbers of unknown range.
    """
    size = jpeg_size(data)
    if size is None:
        return _by_pillow(data, rgb)
    return _jpeg(data, into_HWC if into_HWC is not None and into_HWC.shape[:2] == size else None)


def image_size(data: bytes) -> tuple[int, int]:
    """Return height and width of an image of any supported kind, from its header; decodes nothing.

    Raises:
        CorruptSample: not an image, or too large.
    """
    return (
        jpeg_size(data)
        or _png_size(data)
        or _by_pillow(data, lambda image: (image.height, image.width))
    )


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG that :func:`decode_crop` supports; None for any other image.

    Raises:
        CorruptSample: too large.
    """
    if data[:2] != b"\xff\xd8":
        return None
    import simplejpeg

    try:
        high, wide, space, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # no header, or a valid one with rare chroma: left to Pillow
        return None
    _check_size(wide, high)
    _check_scans(data, wide, high)
    return None if space in ("CMYK", "YCCK") else (high, wide)


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a PNG; None for any other image, and for a PNG whose size is not certain by its start.

    A tenth of the time that Pillow takes to open it, which a server would spend on every upload.

    Raises:
        CorruptSample: too large.
    """
    # Pillow believes the last of several headers.
    if data[:8] != PNG or data[12:16] != b"IHDR" or data.count(b"IHDR") > 1 or len(data) < 33:
        return None
    wide, high = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    _check_size(wide, high)
    return (high, wide) if high and wide else None


def _check_scans(data: bytes, wide: int, high: int) -> None:
    if high * wide * len(data) > MAX_WORK and not _in_one_scan(
        data
    ):  # otherwise too short for that many
        scans = data.count(b"\xff\xda")
        if high * wide * scans > MAX_WORK:
            raise CorruptSample(f"{wide} x {high} pixels in {scans} scans")


def _in_one_scan(data: bytes) -> bool:
    """Return whether a JPEG is certainly sequential with all color components in its first, hence only, scan.

    Only the few header segments are walked: searching the whole file for markers takes twenty times as long.
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
    """Decode rows [top, top + high) and columns [left, left + wide) of a JPEG of a known ``size``.

    The pixels [high, wide, 3] equal those of a full decode; the optional extra
    (:mod:`cnn2gnn_dist.data.images.partial`) makes this faster.

    Raises:
        CorruptSample: as :func:`decode`; with the extra, corruption below the crop may go undetected.
    """
    from cnn2gnn_dist.data.images import partial  # imported here: it also runs with python -m

    crop = partial.crop(data, *size, top, left, high, wide)
    return _jpeg(data)[top : top + high, left : left + wide] if crop is None else crop


def _jpeg(data: bytes, into_HWC: np.ndarray | None = None) -> np.ndarray:
    import simplejpeg

    try:
        made = simplejpeg.decode_jpeg(data, "RGB", buffer=into_HWC, strict=True)
    except ValueError as error:
        raise CorruptSample(str(error)) from None
    return made if into_HWC is None else into_HWC


def _by_pillow(data: bytes, read: Callable[[Any], T]) -> T:
    from PIL import Image, UnidentifiedImageError

    _silence_pillow()
    try:
        _check_size(*_webp_canvas(data))
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            _check_size(*image.size)
            if data[:2] == b"\xff\xd8":
                _check_scans(data, *image.size)
            if image.format == "TIFF":  # a tile may be larger than its image
                tags = image.tag_v2  # type: ignore[attr-defined]
                _check_size(tags.get(TILE_WIDTH, 0), tags.get(TILE_HEIGHT, 0))
            return read(image)
    except CorruptSample:
        raise
    except UnidentifiedImageError:
        raise CorruptSample(_not_opened(data)) from None
    except Image.DecompressionBombError as error:  # of more than twice as many, while it is opened
        pixels = re.search(r"\d+ pixels", str(error))
        raise CorruptSample(
            f"{pixels.group() if pixels else 'pixels'}, more than {MAX_PIXELS}"
        ) from None
    except Exception as error:
        raise CorruptSample(f"{type(error).__name__}: {error}") from None


@functools.cache  # a change of the filters makes all warnings appear once more
def _silence_pillow() -> None:
    """Let no warning of large images appear: ``_check_size`` refuses them."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _not_opened(data: bytes) -> str:
    kind = image_suffix(data)
    if kind is None:
        what = what_it_is(data)
        return (
            f"{what}{NO_IMAGE}" if what == kind_of(data[:ENOUGH]) and "image" not in what else what
        )
    return f"{kind.upper()} of an unsupported variety, or with a corrupt header"


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Return width and height of a WebP, else (0, 0); merely opening a WebP allocates all its pixels."""
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
        raise CorruptSample(f"{wide} x {high} pixels, more than {MAX_PIXELS}")
