"""Whose turn it is to edit a memory, and the removal of what earlier edits no longer need or left behind."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.memory.store import Version

_POLL_S = 0.05


@contextmanager
def editing(root: Path, wait_s: float = 10.0) -> Iterator[None]:
    """Hold the right to edit, and remove what an edit left behind that was killed, or could not remove it.

    Raises:
        UserError: another process holds it longer than ``wait_s``; the folder can't be written, or is gone.
    """  # noqa: DOC501
    lock = FileLock(str(root / store.LOCK))
    try:
        _wait(root, lock, wait_s)
    except Timeout:
        raise UserError(
            f"another process has been editing this memory for more than {wait_s:g} s",
            where=str(root),
            remedy="run the command again when the other edit has finished",
        ) from None
    except OSError as error:
        if not root.is_dir():
            raise _gone(root) from None
        raise UserError(
            f"this memory can't be written: {error.strerror}", where=str(root),
            remedy="copy the model to a folder that you can write to",
        ) from None  # fmt: skip
    try:
        _finish(root)
        yield
    finally:
        lock.release()


@contextmanager
def editing_if_there(root: Path) -> Iterator[None]:
    """``editing``, if there is a memory.

    Raises:
        UserError: see ``editing``.
    """
    if (root / store.HEAD).is_file():
        with editing(root):
            yield
    else:
        yield


def _wait(root: Path, lock: FileLock, wait_s: float) -> None:
    """Acquire the lock, but never create its folder: while it is waited for, the model may be moved away.

    Raises:
        UserError: the folder is gone.
        Timeout: another process holds it longer than ``wait_s``.
    """  # noqa: DOC501
    until = time.monotonic() + wait_s
    while root.is_dir():
        left = until - time.monotonic()
        try:
            lock.acquire(timeout=max(min(left, _POLL_S), 0), poll_interval=_POLL_S)
            return
        except Timeout:
            if left <= 0:
                raise
    raise _gone(root)


def _gone(root: Path) -> UserError:
    return UserError(
        "this memory is gone: another command has replaced the model, or is about to",
        where=str(root),
        remedy="run the command again when that one has finished; nothing was changed",
    )


def drop_all_but(root: Path, version: Version) -> None:
    """Delete all other versions, and the segments that only they use."""
    kept = {name for name, _ in version.segments}
    _drop(
        [
            store.version_folder(root, number)
            for number in store.numbers(root)
            if number != version.number
        ]
        + [store.segment_folder(root, name) for name in store.segments(root) if name not in kept]
    )


def _finish(root: Path) -> None:
    """Remove unfinished folders; after a compaction that was killed also what only earlier versions used."""
    for unfinished in root.glob("*/*.tmp"):
        _delete(unfinished)
    try:
        current = store.read_version(root, store.head(root))
        if current.parent is not None:
            return  # ``undo`` may need the others
        old = [number for number in store.numbers(root) if number < current.number]
        undone = [store.read_version(root, number) for number in store.numbers(root)[len(old) :]]
    except UserError:
        return  # a new memory, or a damaged one: whoever opens it says so
    used = {name for version in undone for name, _ in version.segments}
    _drop(
        [store.version_folder(root, number) for number in old]
        + [store.segment_folder(root, name) for name in store.segments(root) if name not in used]
    )


def _drop(folders: Sequence[Path]) -> None:
    """Take folders out of the memory, all of them first, and delete their files."""
    gone = [path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp") for path in folders]
    for path, unfinished in zip(folders, gone, strict=True):
        os.replace(path, unfinished)
    for unfinished in gone:
        _delete(unfinished)


def _delete(path: Path) -> None:
    """Delete a file, or a folder with everything in it, except for what is in use.

    On NFS a file that a process has mapped stays, as ``.nfs…``, until that process closes it, and its folder until the
    next edit.

    Raises:
        OSError: it may not be deleted.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            for one in path.iterdir():
                _delete(one)
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise
