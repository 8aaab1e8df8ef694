"""Shards behind URLs: sizes, byte ranges and whole copies through fsspec, tried again when it pays.

Any protocol that fsspec knows. How to reach a store is said where fsspec and the cloud's own
tools look for it: ``FSSPEC_S3='{"key": …}'``, ``AWS_ENDPOINT_URL``, ``~/.aws``. Knows nothing of
manifests.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

from cnn2gnn_dist.errors import UserError

Result = TypeVar("Result")

ATTEMPTS = 6
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds before trying again: doubling, each shortened by up to a half at random."""
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
"""A server that does not answer, or stops in the middle, for so long counts as failed."""
BLOCK = 8 << 20
"""Bytes of one request of a download: what is lost when one fails."""


class ShortBody(OSError):
    """A server sent fewer bytes than it should have."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of something that is not a local file."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


def size(url: str) -> int:
    """Length of a remote file in bytes.

    Raises:
        UserError: it is not there, not to be reached, or its length is not known.
    """
    length = _again(url, lambda: _files(url).info(url)["size"])
    if length is None:
        raise UserError(
            "the server does not say how long this file is",
            where=url,
            remedy="download it, or serve it by a server that sends Content-Length",
        )
    return int(length)


def read_range(url: str, offset: int, count: int) -> bytes:
    """``count`` bytes from ``offset``; servers that ignore ranges are borne with.

    Raises:
        UserError: it is not there or not to be reached, or has fewer bytes.
    """
    if count == 0:
        return b""

    def read() -> bytes:
        data: bytes = _files(url).cat_file(url, start=offset, end=offset + count)
        if len(data) > count:  # the whole file, then
            data = data[offset : offset + count]
        if len(data) < count:
            raise ShortBody(f"{len(data):,} of {count:,} bytes came")
        return data

    return _again(url, read)


def download(url: str, length: int, file: IO[bytes]) -> None:
    """Write the whole of a remote file of ``length`` bytes.

    Raises:
        UserError: as :func:`read_range`.
        OSError: the disk is full, or fails.
    """
    for first in range(0, length, BLOCK):
        file.write(read_range(url, first, min(BLOCK, length - first)))
    file.flush()


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local file of the same bytes: the path itself, or a copy that is deleted afterwards."""
    if not is_remote(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="cnn2gnn-", suffix=".tar") as file:
        download(path, size(path), file)  # type: ignore[arg-type]
        yield file.name


def matches(pattern: str) -> list[str]:
    """URLs that a glob, or a folder's URL with a slash at its end, stands for, sorted.

    Raises:
        UserError: the store is not to be reached, or can't list.
    """
    files = _files(pattern)
    wanted = f"{pattern}*.tar" if pattern.endswith("/") else pattern
    found = _again(pattern, lambda: files.glob(wanted))
    return sorted(files.unstrip_protocol(name) for name in found)


def _again(url: str, do: Callable[[], Result]) -> Result:
    draws = random.Random(url)
    for attempt in range(ATTEMPTS):
        try:
            return do()
        except UserError:
            raise
        except ImportError as error:
            raise UserError(
                f"this kind of URL needs a package that is not installed: {error}",
                where=url,
                remedy="pip install 'cnn2gnn-dist[remote]'",
            ) from None
        except Exception as error:
            if not _transient(error) or attempt == ATTEMPTS - 1:
                tries = f" ({attempt + 1} attempts)" if attempt else ""
                raise UserError(
                    f"this can't be read{tries}: {type(error).__name__}: {error}",
                    where=url,
                    remedy="check the URL, the credentials and the network",
                ) from error
        pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
        time.sleep(pause * (1 - draws.random() / 2))
    raise AssertionError("unreachable")


def _transient(error: BaseException) -> bool:
    """Whether trying again may help: broken connections, timeouts, a server's own errors."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ValueError):
        return False
    status = getattr(error, "status", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    # aiohttp's and botocore's errors of a connection are neither one family nor all OSErrors.
    return isinstance(error, OSError | asyncio.TimeoutError) or type(error).__module__.startswith(
        ("aiohttp", "botocore", "aiobotocore", "urllib3", "fsspec")
    )


def _files(url: str) -> Any:
    return _opened(url.partition("://")[0], os.getpid())


@functools.lru_cache(maxsize=16)
def _opened(protocol: str, _pid: int) -> Any:
    """The file system of a protocol, one a process: its event loop does not survive a fork."""
    try:
        import fsspec

        return fsspec.filesystem(
            protocol, skip_instance_cache=True, use_listings_cache=False, **_timeouts(protocol)
        )
    except (ImportError, ValueError) as error:
        raise UserError(
            f"URLs of {protocol}:// can't be opened: {error}",
            where=f"{protocol}://",
            remedy="pip install 'cnn2gnn-dist[remote]', or the package that fsspec names",
        ) from None


def _timeouts(protocol: str) -> dict[str, Any]:
    if protocol in ("http", "https"):
        import aiohttp

        patience = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
        )
        return {"client_kwargs": {"timeout": patience}}
    if protocol in ("s3", "s3a"):
        return {
            "config_kwargs": {
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"max_attempts": 1},  # ours count
            }
        }
    return {}
