"""JPEG files of every kind that the partial decoder reads or must leave to the full one."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from tests.support.shards import encode_image


def textured(high: int, wide: int, seed: int = 0) -> np.ndarray:
    """Sharp edges and noise in all colors, so that wrong chroma at a cut shows."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (high, wide, 3))
    blocks = rng.integers(0, 256, (high // 7 + 1, wide // 5 + 1, 3)).repeat(7, 0).repeat(5, 1)
    return ((noise + 3 * blocks[:high, :wide]) // 4).astype(np.uint8)


def by_pillow(image: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def with_exif(image: np.ndarray) -> bytes:
    """With an EXIF rotation, and a thumbnail that is itself a JPEG."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "\u00e9" * 300
    data = by_pillow(image, exif=exif, icc_profile=bytes(range(256)) * 40)
    thumbnail = by_pillow(image[:8, :8])
    comment = b"\xff\xfe" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    return data[:2] + comment + data[2:]


def in_three_scans(image: np.ndarray) -> bytes:
    """A sequential JPEG that stores one color component after the other."""
    grey = [by_pillow(image[..., colour]) for colour in range(3)]
    frame, scan = grey[0].index(b"\xff\xc0"), grey[0].index(b"\xff\xda")
    size = grey[0][frame + 4 : frame + 9]
    tables = grey[0][frame + 2 + 11 : scan]
    head = b"\xff\xc0\x00\x11" + size + b"\x03" + b"".join(bytes((i, 0x11, 0)) for i in (1, 2, 3))
    scans = [
        b"\xff\xda\x00\x08\x01" + bytes((i + 1, 0)) + b"\x00\x3f\x00" + data[scan + 10 : -2]
        for i, data in enumerate(grey)
    ]
    return grey[0][:frame] + head + tables + b"".join(scans) + b"\xff\xd9"


def by_turbo(chroma: str) -> Callable[[np.ndarray], bytes]:
    return lambda image: simplejpeg.encode_jpeg(image, 90, colorsubsampling=chroma)


CUT = {
    **{chroma: by_turbo(chroma) for chroma in ("444", "422", "420", "440", "411")},
    "grey": lambda image: by_pillow(image[..., 0]),
    "rgb inside": lambda image: by_pillow(image, keep_rgb=True, subsampling=0),
    "restarts by block": lambda image: by_pillow(image, restart_marker_blocks=2),
    "restarts by row": lambda image: by_pillow(image, restart_marker_rows=1, subsampling=1),
    "optimized": lambda image: by_pillow(image, optimize=True, quality=25),
    "best": lambda image: by_pillow(image, quality=100, subsampling=2),
    "exif": with_exif,
}
"""Kinds of JPEG that the extra decodes."""


WHOLE = {
    "progressive": lambda image: by_pillow(image, progressive=True),
    "three scans": in_three_scans,
    "cmyk": lambda image: encode_cmyk(image),
    "png": lambda image: encode_image(image, "png"),
    "something behind": lambda image: by_pillow(image) + b"\0",
}
"""Kinds that are left to the full decoder."""


def encode_cmyk(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(file, "JPEG")
    return file.getvalue()
