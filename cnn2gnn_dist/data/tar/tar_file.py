"""An archive as an open file: positioned reads, and errors that say what is wrong with it."""

from __future__ import annotations

import os
import stat

from cnn2gnn_dist.errors import UserError

BLOCK = 512
WRITE_AGAIN = "download the shard again, or write it again"


def shown(name: str, limit: int = 120) -> str:
    """Format a name for a message: one line, no control characters, bounded length."""
    text = name[: limit + 1]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit and len(name) <= limit else f"{text[:limit]}…"


class SkippedMembers(dict[str, tuple[int, str]]):
    """Members that belong to no sample: reason → number of members and the name of the first."""

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count members; ``name`` is the name of the first."""
        before, first = self.get(reason, (0, name))
        self[reason] = before + count, first

    def merge(self, other: SkippedMembers) -> None:
        """Add the counts of another archive."""
        for reason, (count, first) in other.items():
            self.add(reason, first, count)

    def note(self, where: str) -> str | None:
        """Return one sentence with the counts by reason and the first example of each, or None."""
        if not self:
            return None
        parts = [
            f"{count} {reason} (first: {shown(first, 80)})"
            for reason, (count, first) in sorted(self.items(), key=lambda it: (-it[1][0], it[0]))
        ]
        total = sum(count for count, _ in self.values())
        return f"{total} members of the shards of {where} are left out: {', '.join(parts)}"


class Archive:
    """An open archive with positioned reads; the last two windows are cached.

    Args:
        path: the file.
        where: its name in errors (for example a URL); default: the path.

    Attributes:
        skipped: members left out by whoever walks the archive.

    Raises:
        UserError: the file is missing, not readable, or not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str], where: str | None = None) -> None:
        self.where = where or os.fspath(path)
        self.skipped = SkippedMembers()
        # Without O_NONBLOCK, opening a named pipe would wait for a writer forever.
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            self.fd = os.open(path, flags)
        except (OSError, ValueError) as failure:
            reason = getattr(failure, "strerror", None) or failure
            raise UserError(
                f"the shard cannot be opened: {reason}",
                where=self.where,
                remedy="check the path and its permissions; is the data's file system mounted?",
            ) from failure
        about = os.fstat(self.fd)
        self.bytes = about.st_size
        self._start, self._window = 0, b""
        self._start_before, self._before = 0, b""
        if not stat.S_ISREG(about.st_mode):
            self.close()
            raise UserError(
                "the shard is not a regular file",
                where=self.where,
                remedy="name .tar files, or a folder that contains some",
            )

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)

    def window(self, offset: int, size: int) -> bytes:
        """Read at most ``size`` bytes (fewer at the end of the file) and cache them."""
        self._start_before, self._before = self._start, self._window
        self._start, self._window = offset, self._pread(offset, size)
        return self._window

    def read(self, offset: int, size: int) -> bytes:
        """Read at most ``size`` bytes (fewer at the end of the file), from a cached window if possible."""
        begin = offset - self._start
        if begin >= 0:
            if begin + size <= len(self._window):
                return self._window[begin : begin + size]
        else:
            begin = offset - self._start_before
            if begin >= 0 and begin + size <= len(self._before):
                return self._before[begin : begin + size]
        return self._pread(offset, size)

    def holds(self, offset: int, size: int, what: bytes) -> bool:
        """Return whether the ``size`` bytes contain ``what``, without copying from a cached window."""
        begin = offset - self._start
        if begin >= 0 and begin + size <= len(self._window):
            return self._window.find(what, begin, begin + size) >= 0
        return what in self.read(offset, size)

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self.fd, size, offset)
        except (OSError, OverflowError) as failure:
            raise UserError(
                f"the shard cannot be read: {failure}",
                where=self.where,
                remedy="check the disk or the network file system that holds it",
            ) from failure

    def truncated(self, what: str, needed: int) -> UserError:
        """Return the error for something that would extend to byte ``needed``."""
        return UserError(
            f"the shard is truncated: {what} extends to byte {needed:,}, but the file has "
            f"{self.bytes:,}",
            where=self.where,
            remedy=WRITE_AGAIN,
        )

    def ended(self, position: int) -> UserError:
        """Return the error for an archive that ends where the next header should be."""
        if not self.bytes:
            what = "the shard is empty (0 bytes)"
            return UserError(what, where=self.where, remedy=WRITE_AGAIN)
        if position != self.bytes:
            return self.truncated("a member's header", position + BLOCK)
        return UserError(
            "the shard has no end-of-archive block: it may be truncated between two members",
            where=self.where,
            remedy=f"{WRITE_AGAIN}; if it is known to be complete, terminate it: "
            f"truncate -s +1024 '{self.where}'",
        )

    def damaged(self, what: str, offset: int) -> UserError:
        """Return the error for an invalid header."""
        return UserError(
            f"the shard is not a valid tar archive: {what} at byte {offset:,}",
            where=self.where,
            remedy=WRITE_AGAIN,
        )
