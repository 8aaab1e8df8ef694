"""Disk cache of complete remote shards, bounded in size and shared by the processes of a host.

``NAME.tar`` is complete, ``NAME.part`` is being downloaded. NAME is a hash, so nothing in a URL or a
tar decides where files are written. A process that holds the lock of a ``.part`` file downloads it. A
process that holds a shared lock of a ``.tar`` file reads it, and the file is not evicted meanwhile:
deleting an open file does not free its disk space, so the bound would not hold. Locks (flock) are
released by the kernel when their holder exits, so a killed process leaves an unlocked ``.part`` file,
which the next download removes. A ``.part`` file is allocated at full length from the start, so that
downloads in progress count toward the bound.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.errors import ShardChanged

_log = logging.getLogger(__name__)

REST = 30.0
"""Seconds since its last use before a shard may be evicted. Without it, a window of shards larger than
the cache would replace the cache's contents with every batch."""
WAIT_SECONDS = 900.0
"""Seconds to wait for a shard that another process is downloading before reading it in ranges."""
_POLL = 0.05
_OURS = re.compile(r"[0-9a-f]{40}\.(tar|part)")


class ShardCache:
    """Complete copies of remote shards, at most ``limit`` bytes including downloads in progress.

    Args:
        folder: created if missing; other files in it are not touched.
        limit: maximum bytes on disk.
        rest: see :data:`REST`.
    """

    def __init__(self, folder: Path, limit: int, rest: float = REST) -> None:
        self.folder, self.limit, self._rest = folder, limit, rest
        self._warned = False

    def held(self, url: str, length: int) -> int | None:
        """Return a descriptor of a cached shard, or None; the shard is kept until :func:`release`."""
        try:
            return self._open_complete(_name(url, length), length)
        except OSError:  # any kind: the shard can also be read remotely
            return None

    def open(self, url: str, length: int, check: Callable[[int], str] | None = None) -> int | None:
        """Return a descriptor of a shard as :meth:`held` does, downloading it first if it is missing.

        Args:
            url: URL of the shard.
            length: length of the shard in bytes.
            check: returns what is wrong with a copy ("" if nothing). A wrong copy is downloaded once more.

        Returns:
            The descriptor, or None if there is no room (if the disk is full or not writable, this is
            reported once), or if the process that downloads it takes too long.

        Raises:
            UserError: the shard is missing, unreachable, of a different length, or corrupt.
        """
        if length > self.limit:
            return None
        try:
            return self._open(url, length, check)
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning(
                    f"can't cache shards in {self.folder} ({error.strerror}): reading ranges "
                    "instead"
                )
            return None

    def drop(self, url: str, length: int) -> None:
        """Remove a shard whose bytes turned out to be wrong."""
        with contextlib.suppress(OSError), self._exclusive():
            os.unlink(self.folder / f"{_name(url, length)}.tar")

    def _open(self, url: str, length: int, check: Callable[[int], str] | None) -> int | None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = _name(url, length)
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            handle = self._open_complete(name, length)
            if handle is not None:
                return handle
            part = self._claim(name)
            if part is None:
                time.sleep(_POLL)
                continue
            try:
                if not os.path.exists(
                    self.folder / f"{name}.tar"
                ):  # otherwise another process has just completed it
                    if not self._make_room(part, name, length):
                        return None
                    _fill(part, url, length, check)
                    os.rename(self.folder / f"{name}.part", self.folder / f"{name}.tar")
                    _lock(part, fcntl.LOCK_SH)  # the next line needs a shared lock too
                    handle = self._open_complete(name, length)
                    if handle is not None:
                        return handle
            finally:
                if _is(part, self.folder / f"{name}.part"):  # not renamed, so incomplete
                    os.unlink(self.folder / f"{name}.part")
                release(part)
        return None

    def _open_complete(self, name: str, length: int) -> int | None:
        """Open a complete shard under a shared lock, if it is cached."""
        path = self.folder / f"{name}.tar"
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        kept = False
        try:
            # If the lock is taken, or the file has no name any more, it is being removed.
            if _lock(handle, fcntl.LOCK_SH) and os.fstat(handle).st_nlink:
                kept = os.fstat(handle).st_size == length
                if kept:
                    now = time.time_ns()  # the kernel's file clock ticks only 250 times a second
                    os.utime(handle, ns=(now, now))
                else:
                    os.unlink(path)  # someone truncated it
        finally:
            if not kept:
                release(handle)
        return handle if kept else None

    def _claim(self, name: str) -> int | None:
        """Open the ``.part`` file and lock it; None if another process holds it."""
        path = self.folder / f"{name}.part"
        part = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        ours = False
        try:
            ours = _lock(part, fcntl.LOCK_EX) and _is(part, path)
        finally:  # locking fails on file systems without locks
            if not ours:
                os.close(part)
        return part if ours else None

    def _make_room(self, part: int, name: str, length: int) -> bool:
        """Evict the least recently used shards until ``length`` fits, and allocate the space."""
        with self._exclusive():
            os.ftruncate(part, 0)  # drop what a killed process had written
            used, idle = 0, []
            for path in self._ours():
                try:
                    found = path.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if path.suffix == ".part" and path.stem != name and _remove_idle(path):
                    continue
                used += found.st_size
                if path.suffix == ".tar" and time.time() - found.st_mtime >= self._rest:
                    idle.append((found.st_mtime_ns, found.st_size, path))
            for _, bytes_of_it, path in sorted(idle):
                if used + length <= self.limit:
                    break
                if _remove_idle(path):
                    used -= bytes_of_it
            if used + length > self.limit:
                return False
            if length:
                os.posix_fallocate(part, 0, length)  # fails here if the disk is full
            return True

    def _ours(self) -> list[Path]:
        with os.scandir(self.folder) as entries:
            return [Path(entry.path) for entry in entries if _OURS.fullmatch(entry.name)]

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Lock the counting and eviction, so that one process does it at a time."""
        lock = os.open(self.folder / ".room", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            release(lock)


def release(handle: int) -> None:
    """Unlock and close a descriptor returned by the cache."""
    try:
        fcntl.flock(
            handle, fcntl.LOCK_UN
        )  # closing is not enough: a forked child may have it open too
    finally:
        os.close(handle)


def _name(url: str, length: int) -> str:
    return hashlib.sha256(f"{url} {length}".encode()).hexdigest()[:40]


def _fill(part: int, url: str, length: int, check: Callable[[int], str] | None) -> None:
    found = urls.size(url)
    if found != length:
        raise ShardChanged(
            f"this shard has changed: it has {found:,} bytes, but had {length:,} when indexed",
            where=url,
        )
    wrong = ""
    for _ in range(2):
        with open(os.dup(part), "r+b") as file:
            file.seek(0)
            urls.download(url, length, file)
        os.fsync(part)  # the data must be on disk before the rename
        wrong = check(part) if check else ""
        if not wrong:
            return
    raise ShardChanged(f"this shard is missing, truncated or changed: {wrong}", where=url)


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(handle: int, path: Path) -> bool:
    """Return whether a path still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_idle(path: Path) -> bool:
    """Remove a file if no process has it locked; return whether it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        if not (_lock(handle, fcntl.LOCK_EX) and _is(handle, path)):
            return False
        os.unlink(path)
        return True
    finally:
        release(handle)
