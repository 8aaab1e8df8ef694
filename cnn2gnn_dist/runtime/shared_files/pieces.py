"""Parts of files: which rank has filled which bytes of a file that all ranks fill together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from cnn2gnn_dist import durable


class Piece(NamedTuple):
    """A part of a file that has the same size on all hosts, filled by one rank.

    Attributes:
        path: of the file.
        rank: which has written it.
        spans: (offset, bytes) in it.
    """

    path: Path
    rank: int
    spans: tuple[tuple[int, int], ...]


def read(piece: Piece) -> bytes:
    """The bytes of a piece, as they are on this host."""
    parts = []
    with open(piece.path, "rb") as file:
        for offset, size in piece.spans:
            file.seek(offset)
            parts.append(file.read(size))
    return b"".join(parts)


def write(piece: Piece, data: bytes | bytearray) -> None:
    """Put the bytes of a piece in their places, and wait until they are on disk.

    Raises:
        UserError: the disk is full.
    """
    left = memoryview(data)
    handle = os.open(piece.path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        with durable.disk_full_reported(piece.path, resumes=True):
            for offset, size in piece.spans:
                part, left = left[:size], left[size:]
                while part:
                    done = os.pwrite(handle, part, offset)
                    part, offset = part[done:], offset + done
            os.fsync(handle)
    finally:
        os.close(handle)
