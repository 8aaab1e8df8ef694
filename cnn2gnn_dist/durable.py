"""Files that survive a kill: synced to disk, replaced atomically, verified by checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import (
    header_data_from_array_1_0,
    open_memmap,
    write_array_header_1_0,
)

from cnn2gnn_dist.errors import UserError


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget_pages(path: Path) -> None:
    """Drop this host's cached pages of a file that other hosts also write, so that reads ask the server again.

    Pages that some process has mapped stay.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)  # only what is on the server can be dropped
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Replace a file atomically: the caller writes to the yielded path, which is then synced and renamed.

    Readers see the old one or the new one. After an error the old one stays and nothing is left
    behind; what a kill leaves behind is overwritten by the next attempt, or with ``shared`` stays until
    ``remove_unfinished``.

    Args:
        path: the file.
        shared: several processes may do this at the same time, and one of them wins. Otherwise the
            caller ensures that there is only one.

    Raises:
        UserError: the disk is full.
    """
    # Not the process's id: in containers, processes of several hosts have the same.
    name = f".{path.name}.{secrets.token_hex(4)}.tmp" if shared else f"{path.name}.tmp"
    temporary = path.with_name(name)
    try:
        with disk_full_reported(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left of files that they replaced with ``shared``.

    Only where no other process can be writing now.
    """
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Replace a text file atomically (see ``replacing``)."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that a kill cut off is left out."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            found.append(json.loads(text))
    return found


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as ``np.save`` does, in C order; the caller syncs the file.

    On a full disk ``np.save`` raises an error without a number, or none at all: it leaves the writing of the data to
    C's ``fwrite``, and does not look at what closing that file returns.

    Raises:
        UserError: the disk is full.
        ValueError: an array of Python objects.
    """
    if array.dtype.hasobject:
        raise ValueError(f"an array of {array.dtype}")
    array = np.asarray(array, order="C")
    with disk_full_reported(path), open(path, "wb") as file:
        write_array_header_1_0(file, header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file and wait until it is on disk.

    Raises:
        UserError: the disk is full.
    """
    with disk_full_reported(path):
        path.write_text(json.dumps(value, indent=1), encoding="utf-8")
        sync(path)


@contextmanager
def disk_full_reported(path: Path, *, resumes: bool = False) -> Iterator[None]:
    """Report a full disk while something is written to ``path``; ``resumes``: as in ``disk_full``.

    Raises:
        UserError: no space (or no quota) is left.
        OSError: any other error while writing.
    """
    try:
        yield
    except OSError as error:
        if (full := disk_full(error, path, resumes=resumes)) is None:
            raise
        raise full from None


def disk_full(
    error: BaseException, path: Path | str | None = None, *, resumes: bool = False
) -> UserError | None:
    """What to report if an error means that no space (or no quota) is left; None: it means something else.

    Args:
        error: any.
        path: what was written; default: the error's own.
        resumes: the same command goes on where it stopped, as that of a run does.
    """
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return UserError(
        f"disk full: {error.strerror}",
        where=str(path or error.filename or "the run's folder"),
        remedy="free some space and run the same command again"
        + (": it resumes where it stopped" if resumes else ""),
    )


def check_writable(path: Path) -> None:
    """Check that a file can be created, before the work whose result it will hold.

    Raises:
        UserError: it can't.
    """  # noqa: DOC501
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with disk_full_reported(path):
            probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_writable(path, "file", error) from None


def create_folder(folder: Path) -> None:
    """Create a folder and its parents if they are missing, and check that it can be written to.

    Raises:
        UserError: it can't.
    """  # noqa: DOC501
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with disk_full_reported(folder):
            # As in ``replacing``; and another process may be in ``remove_unfinished``.
            probe = folder / f".{secrets.token_hex(4)}.tmp"
            probe.touch()
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(folder, "folder", error) from None


def _not_writable(path: Path, kind: str, error: OSError) -> UserError:
    return UserError(
        f"this {kind} can't be written to: {error.strerror}",
        where=str(path),
        remedy=f"name a {kind} in an existing folder that you can write to",
    )


def reserve_array(path: Path, shape: tuple[int, ...], kind: Any) -> None:
    """Create an array of zeros in a file whose disk space is reserved now.

    A full disk is noticed before the work instead of halfway through.

    Raises:
        UserError: the disk is full; nothing is left behind.
    """
    try:
        with disk_full_reported(path):
            open_memmap(path, "w+", dtype=np.dtype(kind), shape=shape).flush()
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, max(path.stat().st_size, 1))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
