"""Files that survive a kill: synced to disk, replaced atomically, verified by checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from cnn2gnn_dist.errors import UserError


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: readers see the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file and wait until it is on disk."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    sync(path)


@contextmanager
def room(path: Path) -> Iterator[None]:
    """Report a full disk while something is written to ``path``.

    Raises:
        UserError: no space (or no quota) is left.
        OSError: any other error while writing.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no room left: {error.strerror}",
            where=str(path),
            remedy="free some space and run the same command again: it goes on where it stopped",
        ) from None


def reserve_array(path: Path, shape: tuple[int, ...], kind: Any) -> None:
    """Create an array of zeros in a file whose disk space is reserved now.

    A full disk is noticed before the work instead of halfway through.

    Raises:
        UserError: the disk is full; nothing is left behind.
    """
    try:
        with room(path):
            open_memmap(path, "w+", dtype=np.dtype(kind), shape=shape).flush()
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, max(path.stat().st_size, 1))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
