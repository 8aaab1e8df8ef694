"""Arrays on disk that several ranks fill, each with its own rows.

Rows are written with plain writes, not through a memory map: hosts that share a file server write
mapped pages back as a unit, and so restore bytes that another host has just replaced. Readers map
the file again after a barrier that follows the writers' ``sync``.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist import durable


class RowFile:
    """An ``.npy`` file open for writing rows.

    Args:
        path: created by ``durable.reserve_array``; its size doesn't change.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            self.shape, _, self.kind = read(file)
            self._first = file.tell()
        self._row = self.kind.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        # Never open for reading: otherwise NFS extends a write to the full page.
        self._handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, start: int, values: np.ndarray, sum_before: int = 0) -> int:
        """Write rows ``start`` …; return their checksum, continuing from ``sum_before``.

        Raises:
            IndexError: they don't fit.
            ValueError: the rows have a different shape.
            UserError: the disk is full.
        """
        data = np.ascontiguousarray(values, self.kind)
        if data.shape[1:] != self.shape[1:]:
            raise ValueError(f"{self.path.stem}: rows {data.shape[1:]} of {self.shape[1:]}")
        if start < 0 or start + len(data) > self.shape[0]:
            raise IndexError(
                f"{self.path.stem}: rows {start}..{start + len(data)} of {self.shape[0]}"
            )
        place = self._first + start * self._row
        left = data.reshape(-1).view(np.uint8).data
        with durable.disk_full_reported(self.path, resumes=True):
            while left:
                done = os.pwrite(self._handle, left, place)
                left, place = left[done:], place + done
        return check_sum(data, sum_before)

    def span(self, rows: slice) -> tuple[int, int]:
        """Where these rows are in the file: offset, bytes."""
        return self._first + rows.start * self._row, (rows.stop - rows.start) * self._row

    def sync(self) -> None:
        """Wait until everything written is on disk, or on the file server."""
        with durable.disk_full_reported(self.path, resumes=True):
            os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()


def read_rows(path: Path) -> np.ndarray:
    """Map all rows again, so that what other ranks have synced is visible."""
    array: np.ndarray = np.load(path, mmap_mode="r")
    return array


def check_sum(values: Any, before: int = 0) -> int:
    """CRC-32 of rows, continuing from ``before``: detects corruption, not tampering."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)
