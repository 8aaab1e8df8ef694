"""Files that lie elsewhere, as the rest of the package sees them: lengths, ranges, whole copies.

A path is local, a ``file://`` URL, which is local too, or any other URL that fsspec knows. What is
asked of a remote one is tried again while that can help (see :mod:`.transfer`). How to
reach a store is said where fsspec and the cloud's own tools look for it: ``FSSPEC_S3='{"key": …}'``,
``AWS_ENDPOINT_URL``, ``~/.aws``. Nothing here knows what the files hold.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from urllib.parse import unquote, urlsplit

from cnn2gnn_dist.data.storage import transfer
from cnn2gnn_dist.data.storage.transfer import About, Patience, Source
from cnn2gnn_dist.errors import UserError

ATTEMPTS = 6
"""Requests in a row that may fail without having brought a byte."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0
"""Seconds between two of them: doubled each time, less up to half by chance."""
READ_SECONDS = 30.0
"""Seconds to wait for a connection, and for the next byte."""
SECONDS, SLOWEST = 180.0, 100_000.0
"""Seconds for one transfer with all its tries, and bytes a second waited for beyond them."""

_opened = transfer.opened


class Writable(Protocol):
    """What bytes can be written to."""

    def write(self, data: bytes, /) -> object:
        """Take some."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of something that is not a local file."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


def local_path(path: str | os.PathLike[str]) -> str:
    """A local path, also of a ``file://`` URL."""
    text = os.fspath(path)
    return unquote(urlsplit(text).path) if text.startswith("file://") else text


def size(path: str) -> int:
    """Length of a file in bytes.

    Raises:
        UserError: a remote one is not there, may not be read or can't be reached.
        OSError: the same of a local one.
    """
    if not is_remote(path):
        return os.stat(local_path(path)).st_size
    return _source().about(path).bytes


def about(url: str, *, brief: bool = False) -> About:
    """Length and tag of a remote file; errors as :func:`size`.

    ``brief``: a store that does not answer within seconds is not waited for.
    """
    source = _source()
    if brief:
        source = Source(Patience(2, FIRST_PAUSE, 1.0, min(READ_SECONDS, 5.0), 10.0, SLOWEST))
    return source.about(url)


def read_range(path: str, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset``; fewer only where a local file ends. Errors as :func:`size`."""
    if is_remote(path):
        return _source().read_range(path, offset, size)
    handle = os.open(local_path(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(handle, size, offset)
    finally:
        os.close(handle)


def download(url: str, length: int, file: Writable) -> None:
    """Write the ``length`` bytes of a remote file.

    Raises:
        UserError: they can't be had.
        OSError: the file can't take them (a full disk).
    """
    _source().fetch(url, 0, length, file.write)


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A path to a whole local copy, there as long as the context: the file itself if it is local.

    A remote one lies in a temporary file without a name: gone afterwards, however this process
    ends.

    Raises:
        UserError: it can't be read, or there is no disk for it.
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
                f"there is no disk for a copy: {error.strerror}",
                where=path,
                remedy=f"make room in {tempfile.gettempdir()}, or set TMPDIR to another disk",
            ) from None
        yield f"/proc/self/fd/{file.fileno()}"


def matches(pattern: str) -> list[str]:
    """URLs that a remote glob means, or the ``.tar`` files of a folder ("/" at its end), sorted.

    Raises:
        UserError: the store can't be reached, or can't list.
    """
    return _source().matches(pattern + "*.tar" if pattern.endswith("/") else pattern)


def _source() -> Source:
    return Source(Patience(ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE, READ_SECONDS, SECONDS, SLOWEST))
