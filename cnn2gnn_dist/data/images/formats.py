"""Image formats: which are supported, their suffixes, and detection from the first bytes."""

from __future__ import annotations

from cnn2gnn_dist.data.images.file_kind import ENOUGH, kind_of

IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff"),
    *("jpe", "jfif", "pjpeg", "pbm", "pnm", "dib"),
)
"""Suffixes of supported images; of several images of a sample, the first in this order is used."""

KINDS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF")
"""Formats that Pillow may open. Excluded are formats that start other programs (EPS), and AVIF and
JPEG 2000, whose decoders allocate memory for sizes stored deeper in the file than Pillow checks.
"""

HEAD = ENOUGH
"""Number of leading bytes needed to identify a format."""

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}
_MAPS = {b"P1": "pbm", b"P2": "pgm", b"P3": "ppm", b"P4": "pbm", b"P5": "pgm", b"P6": "ppm"}
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_UNREAD = (
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%!PS", "PostScript"),
    (b"\0\0\1\0", "ICO"),
)


def image_suffix(data: bytes) -> str | None:
    """Return the suffix of an encoded image's format from its first bytes; None if not supported."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] in _TIFF:
        return "tif"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if data[2:3].isspace() or data[2:3] == b"#":
        return _MAPS.get(data[:2])
    return None


def what_it_is(data: bytes) -> str:
    """Describe in a few words bytes that are not a supported image."""
    if not data:
        return "an empty file"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in (b"avif", b"avis"):
            return "AVIF, which is not supported"
        return "HEIC, which is not supported" if brand in _HEIF else "a video (MP4 or similar)"
    for start, name in _UNREAD:
        if data.startswith(start):
            return f"{name}, which is not supported"
    if data[:4] == b"RIFF":
        return "audio, video or another RIFF file, not a WebP image"
    return kind_of(data[:ENOUGH]) or f"none of {', '.join(KINDS)}"
