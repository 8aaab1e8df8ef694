"""An archive as an open file: positioned reads, and the errors that name what is wrong with it."""

from __future__ import annotations

import os
import stat

from cnn2gnn_dist.errors import UserError

BLOCK = 512
WRITE_AGAIN = "Download the shard again, or write it again."


def shown(name: str, limit: int = 120) -> str:
    """Make a name fit for a message: one line, no control characters, not too long."""
    text = name[: limit + 1]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit and len(name) <= limit else f"{text[:limit]}…"


class Archive:
    """An open archive: its descriptor, its length, what to call it in errors."""

    def __init__(self, fd: int, where: str, length: int) -> None:
        self.fd = fd
        self.where = where
        self.bytes = length

    def truncated(self, what: str, needed: int) -> UserError:
        """The error for something that would reach to byte ``needed``."""
        return UserError(
            f"The shard is truncated: {what} reaches to byte {needed:,}, "
            f"the file has {self.bytes:,}.",
            where=self.where,
            remedy=WRITE_AGAIN,
        )

    def ended(self, position: int) -> UserError:
        """The error for an archive that ends where the next header should be."""
        if not self.bytes:
            what = "The shard is empty (0 bytes)."
            return UserError(what, where=self.where, remedy=WRITE_AGAIN)
        if position != self.bytes:
            return self.truncated("a member's header", position + BLOCK)
        return UserError(
            "The shard has no end-of-archive block: it may be cut between two members.",
            where=self.where,
            remedy=f"{WRITE_AGAIN} If it is known to be whole, close it: "
            f"truncate -s +1024 '{self.where}'",
        )

    def damaged(self, what: str, offset: int) -> UserError:
        """The error for a header that makes no sense."""
        return UserError(
            f"The shard is not a sound tar archive: {what} at byte {offset:,}.",
            where=self.where,
            remedy=WRITE_AGAIN,
        )


def pread(fd: int, size: int, offset: int, where: str) -> bytes:
    """``os.pread``, whose failure (a bad disk, a file system gone) is a :class:`UserError`."""
    try:
        return os.pread(fd, size, offset)
    except (OSError, OverflowError) as failure:
        raise UserError(
            f"The shard cannot be read: {failure}.",
            where=where,
            remedy="Check the disk or the network file system that holds it.",
        ) from failure


def open_shard(path: str, where: str) -> tuple[int, int]:
    """Open a shard for reading; return its file descriptor and its length in bytes.

    Raises:
        UserError: it is missing, may not be read, or is no regular file.
    """
    # Without O_NONBLOCK a named pipe would wait for its writer for ever.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise UserError(
            f"The shard cannot be opened: {reason}.",
            where=where,
            remedy="Check the path and its permissions; is the data's file system mounted?",
        ) from failure
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        os.close(fd)
        raise UserError(
            "The shard is no regular file.", where=where, remedy="Name .tar files, not folders."
        )
    return fd, about.st_size
