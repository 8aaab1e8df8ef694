"""Whole remote shards on a node's disk: bounded, shared by its processes, whole or not there.

``NAME.tar`` is whole, ``NAME.part`` on its way; NAME is a hash, so nothing in a URL or a tar says
where something is written. Who holds the lock of a part downloads it; who holds a shared lock of a
whole one reads it, and it is not removed: a file that is removed while it is open takes its disk
all the same, so the bound would not hold. Locks are the kernel's (flock) and end with their
holder: what a killed process leaves is a part that nobody holds, which the next download removes.
A part takes its whole length from the start, so what is on its way is counted as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.errors import UserError

REST = 30.0
"""Seconds after its last use before a shard may make room for another. Without it a window of
shards larger than the cache would turn the cache over with every batch."""
PATIENCE = 900.0
"""Seconds to wait for a shard that another process downloads, before it is read in ranges."""
_POLL = 0.05
_OURS = re.compile(r"[0-9a-f]{40}\.(tar|part)")


class ShardCache:
    """Whole copies of remote shards, at most ``limit`` bytes of them, those on their way included.

    Args:
        folder: made when it is not there; other files in it are left alone.
        limit: most bytes on disk.
        rest: see :data:`REST`.
    """

    def __init__(self, folder: Path, limit: int, rest: float = REST) -> None:
        self.folder, self.limit, self._rest = folder, limit, rest
        self._said = False

    def held(self, url: str, length: int) -> int | None:
        """A descriptor of a whole shard that is there; it stays until :func:`release`."""
        try:
            return self._whole(_name(url, length), length)
        except OSError:  # of whatever kind: the shard is elsewhere, too
            return None

    def open(self, url: str, length: int, check: Callable[[int], str] | None = None) -> int | None:
        """As :meth:`held`, downloaded first where it is not there.

        Args:
            url: of the shard.
            length: of the shard, in bytes.
            check: says what is wrong in a copy ("" for nothing). A wrong one is fetched once more.

        Returns:
            None when there is no room for it (the disk is full or can't be written; this is said
            once), or when whoever downloads it takes too long.

        Raises:
            UserError: the shard is missing, not to be reached, of another length, or wrong.
        """
        if length > self.limit:
            return None
        try:
            return self._open(url, length, check)
        except OSError as error:
            if not self._said:
                self._said = True
                print(
                    f"cnn2gnn: no room for shards in {self.folder} ({error.strerror}): "
                    "reading ranges instead",
                    file=sys.stderr,
                    flush=True,
                )
            return None

    def drop(self, url: str, length: int) -> None:
        """Forget a shard whose bytes turned out wrong."""
        with contextlib.suppress(OSError), self._alone():
            os.unlink(self.folder / f"{_name(url, length)}.tar")

    def _open(self, url: str, length: int, check: Callable[[int], str] | None) -> int | None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = _name(url, length)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            handle = self._whole(name, length)
            if handle is not None:
                return handle
            part = self._claim(name)
            if part is None:
                time.sleep(_POLL)
                continue
            try:
                if not os.path.exists(self.folder / f"{name}.tar"):  # else finished meanwhile
                    if not self._make_room(part, name, length):
                        return None
                    _fill(part, url, length, check)
                    os.rename(self.folder / f"{name}.part", self.folder / f"{name}.tar")
                    _lock(part, fcntl.LOCK_SH)  # the next line's goes beside a shared one only
                    handle = self._whole(name, length)
                    if handle is not None:
                        return handle
            finally:
                if _is(part, self.folder / f"{name}.part"):  # not renamed: it is not whole
                    os.unlink(self.folder / f"{name}.part")
                release(part)
        return None

    def _whole(self, name: str, length: int) -> int | None:
        """Open a whole shard under a shared lock, if it is there."""
        path = self.folder / f"{name}.tar"
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        kept = False
        try:
            # A lock that can't be had, or a file without a name: it is being removed.
            if _lock(handle, fcntl.LOCK_SH) and os.fstat(handle).st_nlink:
                kept = os.fstat(handle).st_size == length
                if kept:
                    now = time.time_ns()  # the kernel's own clock of files ticks 250 times a second
                    os.utime(handle, ns=(now, now))
                else:
                    os.unlink(path)  # somebody cut it
        finally:
            if not kept:
                release(handle)
        return handle if kept else None

    def _claim(self, name: str) -> int | None:
        """Open the part and lock it, unless another has."""
        path = self.folder / f"{name}.part"
        part = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if _lock(part, fcntl.LOCK_EX) and _is(part, path):
            return part
        os.close(part)
        return None

    def _make_room(self, part: int, name: str, length: int) -> bool:
        """Remove what was not used for longest until ``length`` fits, and take the room."""
        with self._alone():
            os.ftruncate(part, 0)  # what a killed process had written
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
                os.posix_fallocate(part, 0, length)  # a full disk is said here
            return True

    def _ours(self) -> list[Path]:
        with os.scandir(self.folder) as entries:
            return [Path(entry.path) for entry in entries if _OURS.fullmatch(entry.name)]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time counts and removes."""
        lock = os.open(self.folder / ".room", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            release(lock)


def release(handle: int) -> None:
    """Close what a cache gave."""
    fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open as well
    os.close(handle)


def _name(url: str, length: int) -> str:
    return hashlib.sha256(f"{url} {length}".encode()).hexdigest()[:40]


def _fill(part: int, url: str, length: int, check: Callable[[int], str] | None) -> None:
    found = urls.size(url)
    if found != length:
        raise UserError(
            f"this shard has changed: it has {found:,} bytes, {length:,} were indexed",
            where=url,
            remedy="restore the shard or, if the change is meant, run the same command with --update",
        )
    wrong = ""
    for _ in range(2):
        with open(os.dup(part), "r+b") as file:
            file.seek(0)
            urls.download(url, length, file)
        os.fsync(part)  # its name must not outlive its bytes
        wrong = check(part) if check else ""
        if not wrong:
            return
    raise UserError(
        f"this shard is missing, truncated or changed: {wrong}",
        where=url,
        remedy="restore the shard or, if the change is meant, run the same command with --update",
    )


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(handle: int, path: Path) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_idle(path: Path) -> bool:
    """Remove a file that nobody has locked."""
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
