"""Access to remote and local files for the rest of the package: lengths, ranges, complete copies.

A path is local, a ``file://`` URL (also local), or any other URL that fsspec supports. Remote requests
are retried while a retry can help (see :mod:`.transfer`). Access to a store is configured where fsspec
and the cloud's own tools look for it: ``FSSPEC_S3='{"key": …}'``, ``AWS_ENDPOINT_URL``, ``~/.aws``.
This module is independent of file contents.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from urllib.parse import unquote, urlsplit

from cnn2gnn_dist.data.storage import transfer
from cnn2gnn_dist.data.storage.transfer import FileInfo, RemoteFiles, RetryPolicy
from cnn2gnn_dist.errors import UserError

ATTEMPTS = 6
"""Consecutive requests that may fail without delivering a byte."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0
"""Seconds between two requests: doubled each time, minus a random jitter of up to half."""
READ_SECONDS = 30.0
"""Seconds to wait for a connection, and for the next byte."""
SECONDS, SLOWEST = 180.0, 100_000.0
"""Seconds for one transfer with all its tries, plus the time it takes at this many bytes per second."""

_opened = transfer.opened


class Writable(Protocol):
    """Anything that accepts bytes."""

    def write(self, data: bytes, /) -> object:
        """Write bytes."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL of anything but a local file."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


def local_path(path: str | os.PathLike[str]) -> str:
    """Return the local path, also of a ``file://`` URL."""
    text = os.fspath(path)
    return unquote(urlsplit(text).path) if text.startswith("file://") else text


def size(path: str) -> int:
    """Return the length of a file in bytes.

    Raises:
        UserError: a remote file is missing, not readable or unreachable.
        OSError: a local file is missing or not readable.
    """
    if not is_remote(path):
        return os.stat(local_path(path)).st_size
    return remote_files().file_info(path).bytes


def file_info(url: str, *, brief: bool = False) -> FileInfo:
    """Return length and tag of a remote file; errors as :func:`size`.

    ``brief``: give up on a store that does not answer within seconds.
    """
    files = remote_files()
    if brief:
        files = RemoteFiles(RetryPolicy(2, FIRST_PAUSE, 1.0, min(READ_SECONDS, 5.0), 10.0, SLOWEST))
    return files.file_info(url)


def read_range(path: str, offset: int, size: int) -> bytes:
    """Read ``size`` bytes from ``offset``, fewer only at the end of a local file. Errors as :func:`size`."""
    if is_remote(path):
        return remote_files().read_range(path, offset, size)
    handle = os.open(local_path(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(handle, size, offset)
    finally:
        os.close(handle)


def download(url: str, length: int, file: Writable) -> None:
    """Download the ``length`` bytes of a remote file into ``file``.

    Raises:
        UserError: they can't be read.
        OSError: they can't be written (for example disk full).
    """
    remote_files().fetch(url, 0, length, file.write)


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Context manager for the path of a complete local copy: the file itself if it is local.

    A remote file is copied to an unnamed temporary file, which disappears however this process ends.

    Raises:
        UserError: the file can't be read, or the disk is full.
    """
    if not is_remote(path):
        yield local_path(path)
        return
    with tempfile.TemporaryFile(prefix="cnn2gnn-") as file:
        try:
            download(path, size(path), file)
            file.flush()
        except OSError as error:
            raise UserError(
                f"can't write a temporary copy: {error.strerror}",
                where=path,
                remedy=f"free space in {tempfile.gettempdir()}, or set TMPDIR to another disk",
            ) from None
        yield f"/proc/self/fd/{file.fileno()}"


def matches(pattern: str) -> list[str]:
    """Return the URLs that match a remote glob, or the ``.tar`` files of a folder (trailing "/"), sorted.

    Raises:
        UserError: the store is unreachable or can't list.
    """
    return remote_files().matches(pattern + "*.tar" if pattern.endswith("/") else pattern)


def remote_files() -> RemoteFiles:
    """Return access to remote files with this module's retries."""
    return RemoteFiles(
        RetryPolicy(ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE, READ_SECONDS, SECONDS, SLOWEST)
    )
