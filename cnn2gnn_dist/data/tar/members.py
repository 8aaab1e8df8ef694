"""The members of a tar archive by their headers alone: names and byte ranges, never a payload.

Understood as Python's ``tarfile`` (and so webdataset) understands it: ustar with prefix, GNU long
names (``L``), pax headers (``x``, ``g``) with path and size, base-256 numbers. An archive is read
to its end or refused with a :class:`UserError`: compressed, sparse, damaged and truncated ones are
refused, where ``tarfile`` would silently stop at a damaged header.

Safe on hostile archives: nothing is written or unpickled, names are text and never paths, links,
directories and devices are ignored. Memory is bounded by a window of ``_WIDEST`` bytes and one
extension header of ``MAX_EXTENSION`` bytes, however many the archive has.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from zlib import adler32

from cnn2gnn_dist.data.images.file_kind import kind_of, remedy_for
from cnn2gnn_dist.data.tar.full_header import Careful, Member, header_sums, number, prefix_of
from cnn2gnn_dist.data.tar.tar_file import BLOCK, WRITE_AGAIN, Archive, shown
from cnn2gnn_dist.errors import UserError

_WINDOW, _WIDEST = 3072, 1 << 17  # one read covers a small member and the header after it
_ZERO = bytes(BLOCK)
_COMPRESSED = {
    "a gzip file": "gzip",
    "a bzip2 file": "bzip2",
    "an xz file": "xz",
    "a zstd file": "zstd",
}
_split = struct.Struct("148s8s356s").unpack_from  # up to the checksum, the checksum, after it
_MEMO = 1 << 14  # entries that a memo keeps


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
    with Archive(path, where) as archive:
        yield from members(archive)


def members(tar: Archive) -> Iterator[Member]:
    """As :func:`walk`, of an archive that is open.

    Headers like one before them pass a quick check, others go to Careful. The quick check is as
    strict: type, owner, devices and prefix are as in a header that was found sound, the time is
    sound, and the checksum is exact (148 bytes sum up below adler32's modulus).
    """
    _refuse_foreign(tar)
    careful, new, length = Careful(tar), tuple.__new__, tar.bytes
    window, start, have, position, ahead = b"", 0, 0, 0, _WINDOW
    owner, rest, prefix = b"", b"", ""
    sums, times = _Sums(b""), _Times()
    while True:
        begin = position - start
        if begin + BLOCK > have:
            # Widen while headers lie close together: else most of a window would go unused.
            ahead = min(2 * ahead, _WIDEST) if begin <= have + _WINDOW else _WINDOW
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
            and careful.idle
        ):
            try:
                size = int(head[124:135], 8)
            except ValueError:  # base-256, or damage
                size = -1
            payload = position + BLOCK
            if 0 <= size <= length - payload:
                name = head[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
                yield new(Member, (prefix + name if prefix else name, payload, size))
                position = payload + ((size + BLOCK - 1) & -BLOCK)
                continue
        header = window[begin : begin + BLOCK]
        if header == _ZERO:
            careful.end(position)
            return
        plain = careful.idle
        member, position = careful.take(header, position)
        if member is not None:
            if plain and header[156:157] in b"07":
                owner = head[100:124]
                if after != rest:
                    rest, prefix, sums = after, prefix_of(header), _Sums(after)
            yield member


def _refuse_foreign(tar: Archive) -> None:
    """Raise a UserError that says what a file is which starts like something else than a tar."""
    start = tar.read(0, BLOCK)
    try:  # a first member may be called BZhou.jpg
        if len(start) == BLOCK and number(start[148:156]) in header_sums(start):
            return
    except ValueError:
        pass
    kind = kind_of(start)
    if kind in _COMPRESSED:
        raise UserError(
            f"The shard is compressed ({_COMPRESSED[kind]}): its members cannot be read by "
            "position.",
            where=tar.where,
            remedy="Decompress it to a plain .tar; images gain nothing from compression.",
        )
    if kind == "text":
        begin = shown(start.decode("utf-8", "replace").strip(), 40)
        raise UserError(
            f"The shard is not a sound tar archive but text: '{begin}'.",
            where=tar.where,
            remedy="Name the .tar files themselves, not a list of them or a message about them.",
        )
    if kind not in (None, "a tar archive"):
        raise UserError(
            f"The file is {kind}, not a tar shard.",
            where=tar.where,
            remedy=remedy_for(kind, WRITE_AGAIN),
        )


class _Sums(dict[bytes, int]):
    """From a checksum's bytes to what adler32's lower half must be over the 148 before it."""

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
    """Whether a time field, with the byte before that ends the size, is sound."""

    def __missing__(self, field: bytes) -> bool:
        try:
            number(field[1:])
            sound = field[0] in b"\0 "
        except ValueError:
            sound = False
        if len(self) < _MEMO:
            self[field] = sound
        return sound
