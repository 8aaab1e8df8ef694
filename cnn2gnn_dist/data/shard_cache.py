"""A bounded cache of whole remote shards on disk, shared by all processes of a node.

A shard is downloaded once, under a lock that dies with its holder, to a temporary name, and gets
its own name when it is whole. Names are hashes, so nothing in a URL or a tar can lead outside.
What was used longest ago goes first; a reader that has it open keeps its bytes (POSIX).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from cnn2gnn_dist.data import urls
from cnn2gnn_dist.errors import UserError


class ShardCache:
    """Whole copies of remote shards, at most ``limit`` bytes of them, those on their way included.

    Args:
        folder: of this cache alone; made when it is not there.
        limit: most bytes on disk.

    Raises:
        UserError: the folder can't be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._full = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache of shards can't be made: {error.strerror}",
                where=str(folder),
                remedy="another stream.cache_dir, or stream.cache_bytes=0 to read ranges only",
            ) from None

    def open(self, url: str, length: int) -> int | None:
        """A descriptor of the whole shard; None where the cache has no room for it.

        Raises:
            UserError: the shard is missing, not to be reached, or not of this length.
        """
        path = self._path(url, length)
        with FileLock(f"{path}.lock"):
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                os.utime(path)  # used now: the file system may not keep times of access
                return handle
            if not self._make_room(length, path.with_suffix(".part")):
                return None
            return self._fetch(url, length, path)

    def drop(self, url: str, length: int) -> None:
        """Forget a shard whose bytes turned out wrong."""
        self._path(url, length).unlink(missing_ok=True)

    def _path(self, url: str, length: int) -> Path:
        name = hashlib.sha256(f"{url} {length}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.tar"

    def _fetch(self, url: str, length: int, path: Path) -> int | None:
        found = urls.size(url)
        if found != length:
            raise UserError(
                f"this shard has changed: it has {found:,} bytes, {length:,} were indexed",
                where=url,
                remedy="restore the shard, or index again (`cnn2gnn index --update`)",
            )
        part = path.with_suffix(".part")
        try:
            with open(part, "r+b") as file:
                urls.download(url, length, file)
            os.replace(part, path)
            return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._say_full(error)
            return None
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, length: int, part: Path) -> bool:
        """Reserve ``length`` bytes under the temporary name; evict what was used longest ago."""
        with FileLock(self.folder / "cache.lock"):
            self._sweep()
            part.unlink(missing_ok=True)  # of one who was killed: its lock is ours
            kept = sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime)
            under_way = sum(path.stat().st_size for path in self.folder.glob("*.part"))
            total = under_way + sum(path.stat().st_size for path in kept)
            if under_way + length > self.limit:
                return False
            for path in kept:
                if total + length <= self.limit:
                    break
                total -= path.stat().st_size
                path.unlink()
            try:
                with open(part, "wb") as file:  # counted by the others at its whole size
                    os.posix_fallocate(file.fileno(), 0, length)
            except OSError as error:
                part.unlink(missing_ok=True)
                self._say_full(error)
                return False
            return True

    def _sweep(self) -> None:
        """Remove what processes that were killed left half done: nobody holds its lock."""
        for part in self.folder.glob("*.part"):
            lock = FileLock(f"{part.with_suffix('.tar')}.lock", timeout=0)
            with contextlib.suppress(Timeout), lock:
                part.unlink(missing_ok=True)

    def _say_full(self, error: OSError) -> None:
        if not self._full:
            self._full = True
            print(
                f"cnn2gnn: no room for shards in {self.folder} ({error.strerror}): "
                "reading ranges instead",
                file=sys.stderr,
                flush=True,
            )
