"""The members of a tar archive by their headers alone: names and byte ranges, never a payload.

Understood as Python's ``tarfile`` (and so webdataset) understands it: ustar with prefix, GNU long
names (``L``), pax headers (``x``, ``g``) with path and size, base-256 numbers. An archive is read
to its end or refused with a :class:`UserError`: compressed, sparse, damaged and truncated ones are
refused, where ``tarfile`` would silently stop at a damaged header.

Safe on hostile archives: nothing is written or unpickled, names are text and never paths, links,
directories and devices are ignored. Memory is bounded by one extension header of ``MAX_EXTENSION``
bytes, however many the archive has.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple
from zlib import adler32

from cnn2gnn_dist.errors import UserError

BLOCK = 512
MAX_EXTENSION = 1 << 20  # a long name or pax header; more is damage or an attack
_WINDOW, _WIDEST = 4096, 1 << 17  # one read covers a small member and the header after it
_ZERO = bytes(BLOCK)
WRITE_AGAIN = "Download the shard again, or write it again."

_REGULAR = b"0\x007"
_NO_PAYLOAD = b"123456"  # links, devices, directories, pipes: a size there means nothing
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
# Mode, owner, group, size, time and checksum as nearly every archive writes them.
_USUAL = re.compile(
    rb"(?:[0-7]{7}[\0 ]|[0-7]{6} \0){3}(?:[0-7]{11}[\0 ]){2}(?:[0-7]{6}\0 |[0-7]{7}[\0 ])"
)
_NO_DEVICE = {bytes(16), b"0000000\0" * 2, b"000000 \0" * 2}
_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
_NAME, _PREFIX = slice(0, 100), slice(345, 500)


class Member(NamedTuple):
    """A regular file in a tar: its name, and the byte range of its payload in the archive."""

    name: str
    offset: int
    size: int


def shown(name: str, limit: int = 120) -> str:
    """Make a name fit for a message: one line, no control characters, not too long."""
    text = name[: limit + 1]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit and len(name) <= limit else f"{text[:limit]}…"


class _Archive:
    """Positioned reads through a window, which widens while the headers lie close together."""

    def __init__(self, fd: int, where: str, length: int) -> None:
        self.fd = fd
        self.where = where
        self.bytes = length
        self.start = 0
        self.window = b""
        self._ahead = _WINDOW

    def locate(self, offset: int, size: int, what: str) -> int:
        """Bring ``size`` bytes at ``offset`` into the window; return their place in it.

        Raises:
            UserError: the file ends before, or cannot be read.
        """
        begin = offset - self.start
        if begin >= 0 and begin + size <= len(self.window):
            return begin
        near = begin <= len(self.window) + _WINDOW
        self._ahead = min(2 * self._ahead, _WIDEST) if near else _WINDOW
        self.window = pread(self.fd, max(size, self._ahead), offset, self.where)
        self.start = offset
        if len(self.window) < size:
            raise self.truncated(what, offset + size)
        return 0

    def truncated(self, what: str, needed: int) -> UserError:
        return UserError(
            f"The shard is truncated: {what} reaches to byte {needed:,}, "
            f"the file has {self.bytes:,}.",
            where=self.where,
            remedy=WRITE_AGAIN,
        )

    def damaged(self, what: str, offset: int) -> UserError:
        return UserError(
            f"The shard is not a sound tar archive: {what} at byte {offset:,}.",
            where=self.where,
            remedy=WRITE_AGAIN,
        )


def pread(fd: int, size: int, offset: int, where: str) -> bytes:
    """``os.pread``, whose failure (a bad disk, a file system gone) is a :class:`UserError`."""
    try:
        return os.pread(fd, size, offset)
    except (OSError, OverflowError) as failure:
        raise UserError(
            f"The shard cannot be read: {failure}.",
            where=where,
            remedy="Check the disk or the network file system that holds it.",
        ) from failure


def open_shard(path: str, where: str) -> tuple[int, int]:
    """Open a shard for reading; return its file descriptor and its length in bytes.

    Raises:
        UserError: it is missing, may not be read, or is no regular file.
    """
    # Without O_NONBLOCK a named pipe would wait for its writer for ever.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise UserError(
            f"The shard cannot be opened: {reason}.",
            where=where,
            remedy="Check the path and its permissions; is the data's file system mounted?",
        ) from failure
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        os.close(fd)
        raise UserError(
            "The shard is no regular file.", where=where, remedy="Name .tar files, not folders."
        )
    return fd, about.st_size


def walk(path: str | os.PathLike[str], where: str | None = None) -> Iterator[Member]:
    """Yield the regular files of a tar archive in their order.

    Names are as written: absolute ones and ones with ``..`` too, since they are never paths here.

    Args:
        path: the archive.
        where: what to call it in errors (a URL, say); default: the path.

    Raises:
        UserError: the file is missing, empty, compressed, damaged, sparse or truncated (also: ends
            without the closing zero block, since a cut between two members looks just so).
    """
    name = where or os.fspath(path)
    fd, length = open_shard(os.fspath(path), name)
    try:
        yield from _members(_Archive(fd, name, length))
    finally:
        os.close(fd)


def _members(tar: _Archive) -> Iterator[Member]:
    _refuse_foreign(tar)
    everywhere: dict[str, str] = {}  # from `g` headers
    extension: dict[str, str] = {}  # from the `L` and `x` headers before the next member
    extended = False
    position = 0
    while True:
        if position == tar.bytes:
            raise _unclosed(tar)
        begin = tar.locate(position, BLOCK, "a member's header")
        header = tar.window[begin : begin + BLOCK]
        if header == _ZERO:
            if extended:
                raise tar.damaged("an extension header without a member after it", position)
            return
        size = _size(tar, header, position)
        kind = header[156:157]
        payload = position + BLOCK
        if kind in b"LKxXg":
            _read_extension(tar, kind, payload, size, everywhere, extension)
            position = payload + _padded(size)
            extended = True
            continue
        bare = header[_NAME].partition(b"\0")[0]
        # A NUL type with a trailing slash is how archives of before 1988 write a directory.
        if kind in _NO_PAYLOAD or (kind == b"\0" and bare.endswith(b"/")):
            position = payload
            extension, extended = {}, False
            continue
        name = bare.decode("utf-8", "surrogateescape")
        if header[345]:
            prefix = header[_PREFIX].partition(b"\0")[0].decode("utf-8", "surrogateescape")
            name = f"{prefix}/{name}"
        stride = size
        if extension or everywhere or kind == b"S":
            name, size, stride = _extended(tar, kind, name, size, position, everywhere, extension)
            extension = {}
        extended = False
        if payload + size > tar.bytes:
            raise tar.truncated(f"member '{shown(name)}'", payload + size)
        if kind in _REGULAR:
            yield Member(name, payload, size)
        position = payload + _padded(stride)


def _unclosed(tar: _Archive) -> UserError:
    if not tar.bytes:
        return UserError("The shard is empty (0 bytes).", where=tar.where, remedy=WRITE_AGAIN)
    return UserError(
        "The shard has no end-of-archive block: it may be cut between two members.",
        where=tar.where,
        remedy=f"{WRITE_AGAIN} If it is known to be whole, close it: "
        f"truncate -s +1024 '{tar.where}'",
    )


def _refuse_foreign(tar: _Archive) -> None:
    begin = tar.locate(0, min(BLOCK, tar.bytes), "the first header")
    start = tar.window[begin : begin + BLOCK]
    for magic, kind in _COMPRESSED.items():
        if not start.startswith(magic):
            continue
        try:  # a first member may be called BZhou.jpg
            if len(start) == BLOCK and _number(start[148:156]) in _sums(start):
                return
        except ValueError:
            pass
        raise UserError(
            f"The shard is compressed ({kind}): its members cannot be read by position.",
            where=tar.where,
            remedy="Decompress it to a plain .tar; images gain nothing from compression.",
        )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _size(tar: _Archive, header: bytes, position: int) -> int:
    """Check a header as ``tarfile`` does, and return its size."""
    if _USUAL.match(header, 100) and header[329:345] in _NO_DEVICE:
        size, stated = int(header[124:135], 8), int(header[148:155].rstrip(b"\0 "), 8)
    else:
        try:
            size, stated = _number(header[124:136]), _number(header[148:156])
        except ValueError:
            raise tar.damaged("a header with an impossible size or checksum", position) from None
        try:  # tarfile takes the archive to end at a header with a bad owner or time: don't
            for begin, end in _NUMBERS:
                _number(header[begin:end])
        except ValueError:
            raise tar.damaged("a header with an impossible number", position) from None
    # A sum of 256 bytes is below adler32's modulus: twice as fast as sum(), and exact.
    total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
    if stated != total - sum(header[148:156]) + 256 and stated not in _sums(header):
        raise tar.damaged("a header with a wrong checksum", position)
    if size < 0:
        raise tar.damaged("a header with an impossible size", position)
    return size


def _sums(header: bytes) -> tuple[int, int]:
    """The checksum of a header; and as some old tars compute it, of signed bytes."""
    counted = header[:148] + header[156:]
    total = sum(counted) + 8 * ord(" ")  # the field itself counts as blanks
    return total, total - 256 * sum(byte > 127 for byte in counted)


def _number(field: bytes) -> int:
    """Read a header number: octal digits, or base-256 when marked so; ValueError if neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] > 128 else 0)
    return int(field.partition(b"\0")[0].decode("ascii").strip() or "0", 8)


def _extended(
    tar: _Archive,
    kind: bytes,
    name: str,
    size: int,
    position: int,
    everywhere: dict[str, str],
    extension: dict[str, str],
) -> tuple[str, int, int]:
    """Name, size, and size that leads to the next header, as extension headers have them."""
    fields = {**everywhere, **extension}
    if kind == b"S" or "GNU.sparse" in fields:
        raise UserError(
            f"Member '{shown(fields.get('path', name))}' is stored as a sparse file, "
            "which cannot be read by position.",
            where=tar.where,
            remedy="Write the archive again without --sparse (-S).",
        )
    name = fields.get("path", name)
    stride = size
    if "size" in fields:
        text = fields["size"]
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise tar.damaged(f"a pax header with the impossible size '{shown(text)}'", position)
        size = int(text)
        if "size" in extension:
            stride = size
        elif size > _padded(stride):  # tarfile goes on by the member's own size, so this overlaps
            raise tar.damaged("a global pax header with the size of a single member", position)
    return name, size, stride


def _read_extension(
    tar: _Archive,
    kind: bytes,
    payload: int,
    size: int,
    everywhere: dict[str, str],
    extension: dict[str, str],
) -> None:
    """Take in a header that describes the next member, or (``g``) all that follow."""
    if size > MAX_EXTENSION:
        raise tar.damaged(f"an extension header of {size:,} bytes", payload - BLOCK)
    begin = tar.locate(payload, _padded(size), "an extension header")
    if kind == b"K":  # long link target: links are not samples
        return
    data = tar.window[begin : begin + _padded(size)]
    if kind == b"L":
        text = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        extension.setdefault("path", text)
        return
    records = _pax(tar, data, payload)
    if kind == b"g":
        everywhere.update(records)
        return
    # Of several headers the first counts, and takes what is said globally with it: as in tarfile.
    for field, value in {**everywhere, **records}.items():
        extension.setdefault(field, value)


def _pax(tar: _Archive, data: bytes, position: int) -> dict[str, str]:
    """Parse pax records, each ``<length> <keyword>=<value>\\n`` with the length of it all.

    Kept are path, size, and whether a sparse file is described.
    """
    records: dict[str, str] = {}
    start = 0
    while start < len(data) and data[start] != 0:
        digits, space, _ = data[start : start + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        field, equals, value = data[start + len(digits) + 1 : start + length].partition(b"=")
        if start + length > len(data) or not (field and equals) or not value.endswith(b"\n"):
            raise tar.damaged("a malformed pax header", position)
        if field == b"path":
            records["path"] = value[:-1].decode("utf-8", "surrogateescape").rstrip("/")
        elif field == b"size":
            records["size"] = value[:-1].decode("utf-8", "surrogateescape")
        elif field.startswith(b"GNU.sparse"):
            records["GNU.sparse"] = ""
        start += length
    return records
