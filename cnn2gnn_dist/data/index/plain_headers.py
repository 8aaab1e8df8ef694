"""Headers of a plain archive, checked many at a time.

Most shards hold nothing but regular files whose headers differ in name, size, time and checksum. For these the walk
is a short loop, and numpy checks what :func:`cnn2gnn_dist.data.tar.members.members` checks one by one. Whatever is
unusual, valid or not, ends the attempt: the caller then walks the archive header by header, so that each archive has
one meaning, and each error one message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from cnn2gnn_dist.data.tar.full_header import HeaderParser, Member, prefix_of
from cnn2gnn_dist.data.tar.members import WIDEST, WINDOW
from cnn2gnn_dist.data.tar.tar_file import BLOCK, Archive
from cnn2gnn_dist.errors import UserError

TEXT, LONGEST_JSON = 64, 4096
"""Bytes of a payload that is kept whole, and of a ``.json`` that is searched for a class name."""
_CLASS_NAME = re.compile(rb'"class_name": ?(?:null|"(?:[^"\\]|\\.)*")')
_FIELD = b'"class_name"'
_TOGETHER = 4096  # headers checked at once: 2 MB
_TEXTS = 1 << 16  # maximum number of different payloads
_ZERO = bytes(BLOCK)
_NAME, _OWNER, _SIZE, _TIME, _SUM = 100, 124, 136, 148, 156  # where these fields of a header end


@dataclass(frozen=True)
class PlainHeaders:
    """The m members of a plain archive, in order.

    Attributes:
        name_m: uint8 [m, width]: ASCII, filled up with zeros.
        length_m: length of each name.
        offset_m, size_m: byte range of each payload.
        text_m: which of ``texts`` the payload is, if it has at most ``TEXT`` bytes; of a longer ``.json`` which
            of them is its class name; -1: neither.
        texts: the different payloads and class names (b"": a ``.json`` without one).
    """

    name_m: np.ndarray
    length_m: np.ndarray
    offset_m: np.ndarray
    size_m: np.ndarray
    text_m: np.ndarray
    texts: list[bytes]

    def member(self, number: int) -> Member:
        """Return one of them."""
        name = self.name_m[number, : self.length_m[number]].tobytes().decode("ascii")
        return Member(name, int(self.offset_m[number]), int(self.size_m[number]))


def plain_headers(archive: Archive) -> PlainHeaders | None:
    """Walk an archive to its end; None if any of it is unusual."""
    first = archive.window(0, WINDOW)[:BLOCK]
    if len(first) < BLOCK or first[_SUM : _SUM + 1] != b"0" or prefix_of(first):
        return None
    try:
        HeaderParser(archive).parse(first, 0)
    except UserError:
        return None
    walk = _Walk(archive)
    names: list[np.ndarray] = []
    while True:
        headers = walk.next()
        found = _checked(headers, first) if headers is not None else None
        if found is None:
            return None
        names.append(found)
        if walk.ended:
            break
    width = max(found.shape[1] for found in names)
    name_m = np.concatenate([np.pad(n, ((0, 0), (0, width - n.shape[1]))) for n in names])
    return PlainHeaders(
        name_m,
        np.count_nonzero(name_m, axis=1),
        np.array(walk.offsets, np.int64),
        np.array(walk.sizes, np.int64),
        np.array(walk.codes, np.int64),
        list(walk.texts),
    )


class _Walk:
    """From header to header by their sizes, which are checked afterwards."""

    def __init__(self, archive: Archive) -> None:
        self._archive, self._position, self._ahead = archive, 0, WINDOW
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.codes: list[int] = []
        self.texts: dict[bytes, int] = {}
        self.ended = False

    def next(self) -> np.ndarray | None:
        """Return the next headers, uint8 [n, 512], at most ``_TOGETHER``; None if one is unusual."""
        archive, position, ahead, texts = self._archive, self._position, self._ahead, self.texts
        offsets, sizes, codes, headers = self.offsets, self.sizes, self.codes, list[bytes]()
        window, start, have, length = b"", 0, 0, archive.bytes
        digits = slice(_OWNER, _SIZE - 1)
        for _ in range(_TOGETHER):
            begin = position - start
            if begin + BLOCK > have:
                # As in members(): wide only while headers are close together.
                ahead = min(2 * ahead, WIDEST) if begin <= have + WINDOW else WINDOW
                window, start, begin = archive.window(position, ahead), position, 0
                have = len(window)
            payload = begin + BLOCK
            header = window[begin:payload]
            try:
                size = int(header[digits], 8)
            except ValueError:
                self.ended = header == _ZERO and bool(offsets)
                break
            position += BLOCK
            if not 0 <= size <= length - position:
                return None
            code = -1
            if size <= TEXT:
                text = window[payload : payload + size]
                if len(text) < size:
                    text = archive.read(position, size)
                code = texts.setdefault(text, len(texts))
            elif size <= LONGEST_JSON and header.find(b".json\0", 0, _NAME) > 0:
                about = window[payload : payload + size]
                if len(about) < size:
                    about = archive.read(position, size)
                name = class_name_in(about)
                if name is not None:
                    code = texts.setdefault(name, len(texts))
            headers.append(header)
            offsets.append(position)
            sizes.append(size)
            codes.append(code)
            position += (size + BLOCK - 1) & -BLOCK
        else:
            self._position, self._ahead = position, ahead
            return _rows(headers) if len(texts) <= _TEXTS else None
        return _rows(headers) if self.ended else None


def class_name_in(about: bytes) -> bytes | None:
    """Return a JSON's field ``class_name`` with its value as written; b"" if there is none, None if it is unusual."""
    found = _CLASS_NAME.search(about)
    if found is not None:
        return found[0]
    return None if _FIELD in about else b""


def _rows(headers: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)


def _checked(headers: np.ndarray, first: bytes) -> np.ndarray | None:
    """Return the names, uint8 [n, width]; None unless all headers are plain and sound.

    Plain is: numbers in octal digits that fill their fields, names in ASCII, and in all else the same as the
    ``first``, which has been parsed in full.
    """
    like = np.frombuffer(first, np.uint8)
    for part in (slice(_NAME, _OWNER), slice(_SUM, None)):
        if (headers[:, part] != like[part]).any():
            return None
    for last, ends in ((_SIZE - 1, b"\0 "), (_TIME - 1, b"\0 "), (_SUM - 2, b"\0")):
        digits = headers[:, last - (6 if last > _TIME else 11) : last]
        if ((digits < ord("0")) | (digits > ord("7"))).any():
            return None
        if not np.isin(headers[:, last], list(ends)).all():
            return None
    stated = (headers[:, _TIME : _SUM - 2] - ord("0")) @ (8 ** np.arange(5, -1, -1))
    rest = int(like[_SUM:].sum(dtype=np.int64)) + 8 * ord(
        " "
    )  # the sum's own field counts as spaces
    if (headers[:, :_TIME].sum(axis=1, dtype=np.int64) + rest != stated).any():
        return None
    names = headers[:, :_NAME]
    length = (names != 0).sum(axis=1)
    names = names[:, : int(length.max(initial=0))]
    if (length == 0).any() or (names > 127).any() or (names == ord("\n")).any():
        return None
    if ((names == 0) != (np.arange(names.shape[1]) >= length[:, None])).any():
        return None  # bytes after the name's end
    return names.copy()
