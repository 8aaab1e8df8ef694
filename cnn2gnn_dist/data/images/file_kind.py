"""The kind of a file from its first bytes, for messages about files of the wrong kind."""

from __future__ import annotations

ENOUGH = 512
"""Number of leading bytes needed to identify the kind."""
_MAGIC = (
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1\0", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"%PDF", "a PDF"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "a WebP image"),
)
_REMEDIES = {
    "an HTML page": "open the URL in a browser: is it a login page, an error page, or a page "
    "about the file? Use the URL of the file itself",
    "an XML response": "it may be an error message from the store: read it, and use the URL of "
    "the file itself",
    "JSON": "it may be an error message from the server: read it, and use the URL of the file "
    "itself",
    "a Git LFS pointer": "fetch the actual file: git lfs pull",
    "a Parquet file": "Parquet files are read with data.source=parquet",
    "a JPEG image": "folders of images are read with data.source=imagefolder",
    "a PNG image": "folders of images are read with data.source=imagefolder",
    "a zip archive": "unpack it, and read its images with data.source=imagefolder",
    "a tar archive": "tar shards are read with data.source=shards",
}


def kind_of(start: bytes) -> str | None:
    """Name the kind of a file from its first ``ENOUGH`` bytes ("an HTML page"); None if unknown."""
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    if start[257:262] == b"ustar":
        return "a tar archive"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text[:ENOUGH].lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page"
    if lower.startswith(b"<?xml") or (lower.startswith(b"<") and b"xmlns" in lower):
        return "an HTML page" if b"<html" in lower else "an XML response"
    if text[:1] in (b"{", b"[") and _is_text(start):
        return "JSON"
    if text and _is_text(start):
        return "text"
    return None


def remedy_for(kind: str, otherwise: str) -> str:
    """Return the remedy for a file of this kind where another kind is expected."""
    return _REMEDIES.get(kind, otherwise)


def _is_text(start: bytes) -> bool:
    """Return whether the bytes are UTF-8 without control characters; a truncated last character is fine."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as failure:
        if failure.start < len(start) - 3:
            return False
        text = start[: failure.start].decode("utf-8")
    return all(sign.isprintable() or sign in "\t\r\n\f" for sign in text)
