"""Members of a tar archive, read from the headers alone: names and byte ranges, never a payload.

Archives are interpreted as by Python's ``tarfile`` (and so webdataset): ustar with prefix, GNU long
names (``L``), pax headers (``x``, ``g``) with path and size, base-256 numbers. An archive is read
to its end or refused with a :class:`UserError`: compressed, sparse, corrupt and truncated archives
are refused, where ``tarfile`` would silently stop at a corrupt header.

Safe on hostile archives: nothing is written or unpickled; names are text, never paths; links,
directories and devices are ignored. Memory is bounded by a window of ``WIDEST`` bytes and one
extension header of ``MAX_EXTENSION`` bytes, however many the archive has.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from zlib import adler32

from cnn2gnn_dist.data.images.file_kind import kind_of, remedy_for
from cnn2gnn_dist.data.tar.full_header import HeaderParser, Member, header_sums, number, prefix_of
from cnn2gnn_dist.data.tar.tar_file import BLOCK, WRITE_AGAIN, Archive, shown
from cnn2gnn_dist.errors import UserError

WINDOW, WIDEST = 3072, 1 << 17
"""Bytes of one read: enough for a small member and the next header; at most, where headers are close together."""
_ZERO = bytes(BLOCK)
_COMPRESSED = {
    "a gzip file": "gzip",
    "a bzip2 file": "bzip2",
    "an xz file": "xz",
    "a zstd file": "zstd",
}
_split = struct.Struct("148s8s356s").unpack_from  # before, at and after the checksum
_MEMO = 1 << 14  # maximum entries of a memo


def walk(path: str | os.PathLike[str], where: str | None = None) -> Iterator[Member]:
    """Yield the regular files of a tar archive in order.

    Names are as written, even absolute ones or ones with ``..``: they are never used as paths here.

    Args:
        path: the archive.
        where: its name in errors (for example a URL); default: the path.

    Raises:
        UserError: the file is missing, empty, compressed, corrupt, sparse or truncated. A missing
            closing zero block counts as truncated, since a cut between two members looks the same.
    """
    with Archive(path, where) as archive:
        yield from members(archive)


def members(tar: Archive) -> Iterator[Member]:
    """Yield the regular files of an open archive, as :func:`walk` does.

    Headers that resemble an earlier one take a fast check, others go to `HeaderParser`. The fast check is
    equally strict: type, owner, devices and prefix match a header found valid before, the time is
    valid, and the checksum is exact (148 bytes sum up to less than adler32's modulus).
    """
    _refuse_foreign(tar)
    parser, new, length = HeaderParser(tar), tuple.__new__, tar.bytes
    window, start, have, position, ahead = b"", 0, 0, 0, WINDOW
    owner, rest, prefix = b"", b"", ""
    sums, times = _Sums(b""), _Times()
    while True:
        begin = position - start
        if begin + BLOCK > have:
            # Widen only while headers are close together; otherwise most of a window goes unused.
            ahead = min(2 * ahead, WIDEST) if begin <= have + WINDOW else WINDOW
            window, start, begin = tar.window(position, ahead), position, 0
            have = len(window)
            if have < BLOCK:
                raise tar.ended(position)
        head, check, after = _split(window, begin)
        if (
            after == rest
            and head[100:124] == owner
            and sums[check] == adler32(head) & 0xFFFF
            and times[head[135:148]]
            and parser.idle
        ):
            try:
                size = int(head[124:135], 8)
            except ValueError:  # base-256, or corrupt
                size = -1
            payload = position + BLOCK
            if 0 <= size <= length - payload:
                name = head[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
                yield new(Member, (prefix + name if prefix else name, payload, size))
                position = payload + ((size + BLOCK - 1) & -BLOCK)
                continue
        header = window[begin : begin + BLOCK]
        if header == _ZERO:
            parser.end(position)
            return
        plain = parser.idle
        member, position = parser.parse(header, position)
        if member is not None:
            if plain and header[156:157] in b"07":
                owner = head[100:124]
                if after != rest:
                    rest, prefix, sums = after, prefix_of(header), _Sums(after)
            yield member


def _refuse_foreign(tar: Archive) -> None:
    """Raise a UserError naming the file's kind if it does not start like a tar."""
    start = tar.read(0, BLOCK)
    try:  # a valid header wins: the first member may be called BZhou.jpg, which looks like bzip2
        if len(start) == BLOCK and number(start[148:156]) in header_sums(start):
            return
    except ValueError:
        pass
    kind = kind_of(start)
    if kind in _COMPRESSED:
        raise UserError(
            f"the shard is compressed ({_COMPRESSED[kind]}): its members cannot be read by "
            "position",
            where=tar.where,
            remedy="decompress it to a plain .tar; images do not benefit from compression",
        )
    if kind == "text":
        begin = shown(start.decode("utf-8", "replace").strip(), 40)
        raise UserError(
            f"the shard is not a valid tar archive but text: '{begin}'",
            where=tar.where,
            remedy="name the .tar files themselves, not a list of them or a message about them",
        )
    if kind not in (None, "a tar archive"):
        raise UserError(
            f"the file is {kind}, not a tar shard",
            where=tar.where,
            remedy=remedy_for(kind, WRITE_AGAIN),
        )


class _Sums(dict[bytes, int]):
    """Maps a checksum field to the lower half of the adler32 that the 148 bytes before it must have."""

    def __init__(self, rest: bytes) -> None:
        self.rest = sum(rest)

    def __missing__(self, check: bytes) -> int:
        try:
            expected = number(check) - 8 * ord(" ") - self.rest + 1
        except ValueError:
            expected = -1
        if len(self) < _MEMO:
            self[check] = expected
        return expected


class _Times(dict[bytes, bool]):
    """Maps a time field, with the byte before it that terminates the size, to whether it is valid."""

    def __missing__(self, field: bytes) -> bool:
        try:
            number(field[1:])
            sound = field[0] in b"\0 "
        except ValueError:
            sound = False
        if len(self) < _MEMO:
            self[field] = sound
        return sound
