"""Full parsing of any tar header: extension headers, unusual numbers, unusual types.

Headers are interpreted as Python's ``tarfile`` does, except that what ``tarfile`` would silently
take for the end of the archive is refused.
"""

from __future__ import annotations

from typing import NamedTuple

from cnn2gnn_dist.data.tar.tar_file import BLOCK, Archive, shown
from cnn2gnn_dist.errors import UserError

MAX_EXTENSION = 1 << 20  # a long name or pax header; more is corruption or an attack
_REGULAR = b"0\x007"
_NO_PAYLOAD = b"123456"  # links, devices, directories, pipes: a size there means nothing
_LEFT_OUT = {b"1": "hard links", b"2": "symbolic links"} | dict.fromkeys(
    (b"3", b"4", b"6"), "devices and pipes"
)
_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
_NAME, _PREFIX = slice(0, 100), slice(345, 500)


class Member(NamedTuple):
    """A regular file in a tar: its name, and the byte range of its payload in the archive."""

    name: str
    offset: int
    size: int


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def prefix_of(header: bytes) -> str:
    """Return the ustar prefix of the name: empty, or ending in a slash."""
    # Ignores the magic, as tarfile does (old GNU headers may store times here).
    return f"{_text(header[_PREFIX])}/" if header[345] else ""


def header_sums(header: bytes) -> tuple[int, int]:
    """Return the checksum of a header over unsigned bytes, and over signed bytes as some old tars do."""
    counted = header[:148] + header[156:]
    total = sum(counted) + 8 * ord(" ")  # the field itself counts as spaces
    return total, total - 256 * sum(byte > 127 for byte in counted)


def number(field: bytes) -> int:
    """Parse a header number: octal digits, or base-256 when flagged; ValueError if neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] > 128 else 0)
    return int(field.partition(b"\0")[0].decode("ascii").strip() or "0", 8)


class HeaderParser:
    """Parser for any header; keeps the state that extension headers set for later members.

    Attributes:
        idle: False when an extension header applies to the next member, or requires one.
    """

    def __init__(self, tar: Archive) -> None:
        self.tar = tar
        self.idle = True
        self._everywhere: dict[str, str] = {}  # from `g` headers
        self._extension: dict[str, str] = {}  # from the `L` and `x` headers before the next member
        self._awaited = False  # an extension header requires a member after it

    def end(self, position: int) -> None:
        """Handle the end of the archive."""
        if self._awaited:
            raise self.tar.damaged("an extension header without a member after it", position)

    def parse(self, header: bytes, position: int) -> tuple[Member | None, int]:
        """Parse the header at a position; return its member, if it is one, and the next position.

        Raises:
            UserError: the header is corrupt, extends past the end, or describes a sparse file.
        """
        size = self._size(header, position)
        kind = header[156:157]
        payload = position + BLOCK
        if kind in b"LKxXg":
            self._extend(kind, payload, size)
            self.idle, self._awaited = False, True
            return None, payload + _padded(size)
        fields, extension = {**self._everywhere, **self._extension}, self._extension
        self.idle, self._awaited, self._extension = not self._everywhere, False, {}
        bare = header[_NAME].partition(b"\0")[0]
        name = fields.get("path", prefix_of(header) + _text(bare))
        # Archives from before 1988 write a directory as a NUL type with a trailing slash.
        if kind in _NO_PAYLOAD or (kind == b"\0" and bare.endswith(b"/")):
            if kind in _LEFT_OUT:
                self.tar.skipped.add(_LEFT_OUT[kind], name)
            return None, payload
        if kind == b"S" or "GNU.sparse" in fields:
            raise self._sparse(name)
        stride = size
        if "size" in fields:
            size = self._decimal(fields["size"], position)
            if "size" in extension:
                stride = size
            elif size > _padded(stride):  # tarfile advances by the member's own size: an overlap
                raise self.tar.damaged("a global pax header with one member's size", position)
        if payload + max(size, stride) > self.tar.bytes:
            raise self.tar.truncated(f"member '{shown(name)}'", payload + max(size, stride))
        member = Member(name, payload, size) if kind in _REGULAR else None
        return member, payload + _padded(stride)

    def _size(self, header: bytes, position: int) -> int:
        """Check a header as ``tarfile`` does, and return its size."""
        try:
            size, stated = number(header[124:136]), number(header[148:156])
            for begin, end in _NUMBERS:  # tarfile stops at a bad owner or time and drops the rest
                number(header[begin:end])
        except ValueError:
            raise self.tar.damaged("a header with an impossible number", position) from None
        if stated not in header_sums(header):
            raise self.tar.damaged("a header with a wrong checksum", position)
        if size < 0:
            raise self.tar.damaged("a header with an impossible size", position)
        return size

    def _decimal(self, text: str, position: int) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            what = f"a pax header with the impossible size '{shown(text)}'"
            raise self.tar.damaged(what, position)
        return int(text)

    def _sparse(self, name: str) -> UserError:
        return UserError(
            f"member '{shown(name)}' is a sparse file, which cannot be read by position",
            where=self.tar.where,
            remedy="write the archive again without --sparse (-S)",
        )

    def _extend(self, kind: bytes, payload: int, size: int) -> None:
        """Parse a header that describes the next member, or (``g``) all that follow."""
        if size > MAX_EXTENSION:
            raise self.tar.damaged(f"an extension header of {size:,} bytes", payload - BLOCK)
        if payload + _padded(size) > self.tar.bytes:
            raise self.tar.truncated("an extension header", payload + _padded(size))
        if kind == b"K":  # long link target: links are not samples
            return
        data = self.tar.read(payload, _padded(size))
        if kind == b"L":
            self._extension.setdefault("path", _text(data))
            return
        records = self._records(data, payload)
        if kind == b"g":
            self._everywhere.update(records)
            return
        # As in tarfile, the first of several headers wins, including the global fields it inherits.
        for field, value in {**self._everywhere, **records}.items():
            self._extension.setdefault(field, value)

    def _records(self, data: bytes, position: int) -> dict[str, str]:
        r"""Parse pax records, each ``<length> <keyword>=<value>\n``; the length covers the whole record.

        Only path, size, and whether the header describes a sparse file are kept.
        """
        records: dict[str, str] = {}
        start = 0
        while start < len(data) and data[start] != 0:
            digits, space, _ = data[start : start + 20].partition(b" ")
            length = int(digits) if space and digits.isdigit() else 0
            field, equals, value = data[start + len(digits) + 1 : start + length].partition(b"=")
            if start + length > len(data) or not (field and equals) or not value.endswith(b"\n"):
                raise self.tar.damaged("a malformed pax header", position)
            text = value[:-1].decode("utf-8", "surrogateescape")
            if field == b"path":
                records["path"] = text.rstrip("/")
            elif field == b"size":
                records["size"] = text
            elif field.startswith(b"GNU.sparse"):
                records["GNU.sparse"] = ""
            start += length
        return records
