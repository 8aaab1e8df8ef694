"""Network transfers: retried while a retry can help, otherwise refused with a reason.

Supports any file system that fsspec does. HTTP and S3 run in fsspec's event loop, in a thread. A
process has one file system per set of options, shared by its threads and recreated after a fork.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cnn2gnn_dist.data.storage import network_errors
from cnn2gnn_dist.errors import UserError

PART = 8 << 20
"""Bytes per request where a body cannot be streamed."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy.

    Attributes:
        tries: consecutive requests that may fail without delivering a byte.
        delay: seconds before the second try, doubled for each further one, minus a random jitter of
            up to half, so that many readers don't retry at the same moment.
        longest: maximum seconds between two tries.
        stall: seconds to wait for a connection, and for the next byte.
        seconds: time limit for all tries together, extended by the transfer time at ``slowest``.
        slowest: bytes per second assumed for that extension.
    """

    tries: int = 6
    delay: float = 0.2
    longest: float = 20.0
    stall: float = 30.0
    seconds: float = 180.0
    slowest: float = 100_000.0

    def limit(self, size: int) -> float:
        """Return the time limit in seconds for a transfer of ``size`` bytes."""
        return self.seconds + size / self.slowest


DEFAULT_RETRY = RetryPolicy()


@dataclass(frozen=True)
class FileInfo:
    """Length of a remote file, and a tag that distinguishes its versions ("" if there is none)."""

    bytes: int
    tag: str = ""


@dataclass(frozen=True)
class RemoteFiles:
    """Remote files, read and written with retries."""

    retry: RetryPolicy = DEFAULT_RETRY

    def file_info(self, url: str) -> FileInfo:
        """Query the length and tag of a file.

        Raises:
            UserError: it is missing, not readable, unreachable, or of unknown length.
        """

        def ask(seconds: float) -> Any:
            fs, path = self.filesystem(url)
            return _run(fs, "info", path, seconds=min(seconds, 3 * self.retry.stall))

        found = self._with_retries(url, 0, ask, lambda: 0)
        size = found.get("size")
        if size is None or found.get("type") == "directory":
            raise UserError(
                "this is a folder" if size is not None else "its length can't be determined",
                where=url,
                remedy="name a file, on a server that reports file lengths",
            )
        tags = (found.get(name) for name in ("ETag", "etag", "md5Hash", "Last-Modified"))
        tag = next(filter(None, tags), found.get("LastModified", found.get("mtime", "")))
        return FileInfo(int(size), str(tag))

    def fetch(self, url: str, start: int, end: int, write: Callable[[bytes], object]) -> None:
        """Pass the bytes [start, end) to ``write``, in order and each once.

        Raises:
            UserError: they can't be read.
            OSError: raised by ``write``.
        """
        if end <= start:  # an empty image: no range of bytes can express it
            return
        sink = _Sink(write)

        def ask(seconds: float) -> None:
            fs, path = self.filesystem(url)
            until = time.monotonic() + seconds
            if _streams(fs):
                _sync(fs, _stream, fs, path, start + sink.done, end, sink, seconds=seconds)
            else:
                while start + sink.done < end and time.monotonic() < until:
                    _one_part(fs, path, start + sink.done, end, sink, until)
            if start + sink.done < end:
                raise EOFError("the response body ended early")

        try:
            self._with_retries(url, end - start, ask, lambda: sink.done)
        except UserError:
            if sink.error is None:
                raise
            raise sink.error from None
        finally:
            sink.stop()

    def read_range(self, url: str, start: int, size: int) -> bytes:
        """Read ``size`` bytes from ``start``; errors as in :meth:`fetch`."""
        data = bytearray()
        self.fetch(url, start, start + size, data.extend)
        return bytes(data)

    def matches(self, pattern: str) -> list[str]:
        """Return the URLs that match a glob, sorted; empty if none."""

        def ask(seconds: float) -> list[str]:
            fs, path = self.filesystem(pattern)
            try:
                found = _run(fs, "glob", path, seconds=seconds)
            except FileNotFoundError as error:
                if network_errors.status_of(error) is None:
                    return []
                raise
            return sorted(fs.unstrip_protocol(name) for name in found)

        return self._with_retries(pattern, 0, ask, lambda: 0)

    def send(self, url: str, source: bytes | Path) -> None:
        """Write a complete file, from memory or from a local file; an existing one is replaced.

        Raises:
            UserError: it can't be written.
        """
        size = len(source) if isinstance(source, bytes) else source.stat().st_size

        def ask(seconds: float) -> None:
            fs, path = self.filesystem(url)
            if isinstance(source, bytes):
                _run(fs, "pipe_file", path, source, seconds=seconds)
            else:
                _run(fs, "put_file", str(source), path, seconds=seconds)

        self._with_retries(url, size, ask, lambda: 0, "written")

    def remove(self, url: str) -> None:
        """Remove a file, unless it is already gone.

        Raises:
            UserError: it can't be removed.
        """

        def ask(seconds: float) -> None:
            fs, path = self.filesystem(url)
            with contextlib.suppress(FileNotFoundError):
                _run(fs, "rm_file", path, seconds=seconds)

        self._with_retries(url, 0, ask, lambda: 0, "removed")

    def below(self, url: str) -> dict[str, int]:
        """Lengths of all files below a folder by their paths relative to it; empty if there is none.

        Raises:
            UserError: the store or the bucket is missing, unreachable, or refuses to list.
        """

        def ask(seconds: float) -> dict[str, int]:
            fs, path = self.filesystem(url)
            path = path.rstrip("/")
            fs.invalidate_cache()  # another process may have written since it was listed last
            found = _run(fs, "find", path, detail=True, seconds=seconds)
            return {
                name.removeprefix(path).lstrip("/"): int(about.get("size") or 0)
                for name, about in found.items()
            }

        return self._with_retries(url, 0, ask, lambda: 0, "listed")

    def filesystem(self, url: str) -> tuple[Any, str]:
        """Return the file system of a URL and its path there.

        Raises:
            UserError: the protocol is unknown, or a package for it is missing.
        """  # noqa: DOC501
        protocol, _, rest = url.partition("://")
        try:
            fs = opened(f"{protocol}://{rest.partition('/')[0]}", self.retry.stall, os.getpid())
            return fs, fs._strip_protocol(url)
        except (ImportError, ValueError, TypeError) as error:
            raise network_errors.unknown(url, error) from None

    def _with_retries(
        self,
        url: str,
        size: int,
        ask: Callable[[float], Result],
        done: Callable[[], int],
        what: str = "read",
    ) -> Result:
        """Call ``ask`` with the seconds left, until it succeeds or the retries are used up.

        ``what``: what is done to the file, for the error.
        """  # noqa: DOC501
        retry = self.retry
        began = time.monotonic()
        deadline = began + retry.limit(size)
        chance = random.Random(f"{url} {size} {os.getpid()}")
        failures, before = 0, 0
        while True:
            try:
                return ask(max(0.1, deadline - time.monotonic()))
            except UserError:
                raise
            except Exception as error:
                if not network_errors.is_transient(error):
                    raise network_errors.refused(url, error, what) from None
                failures = failures + 1 if done() == before else 1
                before = done()
                pause = min(retry.longest, retry.delay * 2 ** (failures - 1))
                pause *= chance.uniform(0.5, 1)
                if failures >= retry.tries or time.monotonic() + pause > deadline:
                    waited = time.monotonic() - began
                    raise network_errors.gave_up(url, error, waited, what) from None
                time.sleep(pause)


@contextlib.contextmanager
def explained(field: str) -> Iterator[None]:
    """Name the config's field, if there is one, in the errors of the transfers inside.

    Raises:
        UserError: theirs.
    """
    try:
        yield
    except UserError as error:
        where = f"{field}={error.where}" if field else error.where
        raise UserError(error.what, where=where, remedy=error.remedy) from None


@functools.lru_cache
def opened(root: str, stall: float, process: int) -> Any:
    """Return the file system of "protocol://host", one for all threads of a process."""
    import fsspec

    protocol = root.partition("://")[0]
    options = _time_outs(protocol, stall)
    # fsspec's own cache could return one made with other options or another environment.
    fs, _ = fsspec.core.url_to_fs(root, **options, skip_instance_cache=True)
    if hasattr(fs, "retries"):
        fs.retries = 1  # otherwise s3fs tries five times within each of ours
    return fs


class _Sink:
    """Receiver of bytes. After ``stop`` it discards them, even if an abandoned transfer still runs."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.done = 0
        self.error: OSError | None = None
        self._write: Callable[[bytes], object] | None = write
        self._lock = threading.Lock()

    def __call__(self, data: bytes) -> None:
        with self._lock:
            if self._write is None:
                raise ValueError("the transfer was abandoned")
            try:
                self._write(data)
            except OSError as error:  # disk full, for example: not a network failure
                self.error = error
                raise UserError("the file can't be written") from None
            self.done += len(data)

    def stop(self) -> None:
        with self._lock:
            self._write = None


def _time_outs(protocol: str, stall: float) -> dict[str, Any]:
    """Return timeout options, so that no silent server blocks us forever; fsspec's configuration wins."""
    from fsspec.config import conf

    if protocol in ("http", "https"):
        import aiohttp

        client = {
            # aiohttp's default is five minutes for a whole body, however fast it arrives.
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall),
            "headers": {"Accept-Encoding": "identity"},  # a range of a gzip stream is useless
            "trust_env": True,
        }
        return {"client_kwargs": {**client, **conf.get(protocol, {}).get("client_kwargs", {})}}
    if protocol in ("s3", "s3a"):
        config = {"connect_timeout": stall, "read_timeout": stall, "retries": {"max_attempts": 0}}
        config["max_pool_connections"] = 32
        config |= conf.get(protocol, {}).get("config_kwargs", {})
        return {"use_listings_cache": False, "config_kwargs": config}
    return {}


def _one_part(fs: Any, path: str, start: int, end: int, sink: _Sink, until: float) -> None:
    last = min(end, start + PART)
    left = max(0.1, until - time.monotonic())
    data = _run(fs, "cat_file", path, start=start, end=last, seconds=left)
    if len(data) > last - start:
        raise ValueError(f"requested {last - start:,} bytes but received {len(data):,}")
    sink(data)
    if len(data) < last - start:
        raise EOFError("the response body ended early")


def _run(fs: Any, name: str, *args: Any, seconds: float, **kwargs: Any) -> Any:
    """Call a method of a file system; only asynchronous ones support a time limit."""
    if fs.async_impl:
        return _sync(fs, getattr(fs, f"_{name}"), *args, seconds=seconds, **kwargs)
    return getattr(fs, name)(*args, **kwargs)


def _sync(fs: Any, work: Callable[..., Any], *args: Any, seconds: float, **kwargs: Any) -> Any:
    from fsspec.asyn import sync

    return sync(fs.loop, work, *args, timeout=seconds, **kwargs)


def _streams(fs: Any) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "http" in protocols and hasattr(fs, "set_session")


async def _stream(fs: Any, url: str, start: int, end: int, sink: _Sink) -> None:
    """GET [start, end) once and stream it to the sink, even if the server sends the whole file."""
    session = await fs.set_session()
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    async with session.get(fs.encode_url(url), headers=headers, **options) as answer:
        answer.raise_for_status()
        at = 0
        if answer.status == 206:
            first = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
            at = int(first) if first.isdigit() else start
        if at > start:
            raise ValueError(f"requested bytes from {start:,} but received others")
        async for data in answer.content.iter_chunked(1 << 18):
            wanted = data[max(0, start - at) : end - at]
            at += len(data)
            if wanted:
                sink(wanted)
            if at >= end:  # don't wait for the rest of a whole body
                return
