"""One process at a time in a run's folder: the kernel's lock, or a file where there are no locks.

``flock`` is released when its process ends. Some network file systems have no locks (ENOLCK,
ENOTSUP and the like): there a file that only one process can create serves as the lock. Its
holder touches it every few seconds, so that an abandoned file can be told from a held one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cnn2gnn_dist.errors import FolderInUse, UserError

_log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
"""Seconds between two touches of the file that serves as the lock."""
SILENT_SECONDS = 60.0
"""A holder that has not touched it for this long, by the file system's clock, is gone."""
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

Release = Callable[[], None]


def take(root: Path, seconds: float) -> Release:
    """Take the lock of a run's folder; returns a function that releases it.

    Args:
        root: the run's folder; it need not exist.
        seconds: how long to wait for a holder that is exiting.

    Raises:
        FolderInUse: another process holds it.
        UserError: the lock's file can't be written.
    """
    path = _lock_path(root)
    deadline = time.monotonic() + seconds
    handle = _open(path, root)
    try:
        while (release_lock := _try_lock(path, handle)) is None:
            if time.monotonic() > deadline:
                raise FolderInUse(
                    "another process is using this folder",
                    where=str(root),
                    remedy="wait for it, or choose another run.dir=…",
                )
            time.sleep(0.1)
    except BaseException:
        os.close(handle)
        raise

    def release() -> None:
        release_lock()
        os.close(handle)

    return release


def _lock_path(root: Path) -> Path:
    """Beside the folder, which may not exist yet; inside it if only that is writable."""
    with contextlib.suppress(OSError):
        root.parent.mkdir(parents=True, exist_ok=True)
    beside = os.access(root.parent, os.W_OK)
    return root.parent / f".{root.name}.lock" if beside else root / ".lock"


def _open(path: Path, root: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"this folder is not writable: {error.strerror}",
            where=str(root),
            remedy="another run.dir=… in a folder that you own, or fix its permissions",
        ) from None


def _try_lock(path: Path, handle: int) -> Release | None:
    """Take the lock if it is free; None if it is not."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return _try_lock_file(path.with_name(path.name + ".held"), error.strerror or "")
    return lambda: None


def _try_lock_file(path: Path, why: str) -> Release | None:
    """Create the file that serves as the lock; one whose holder is gone is removed."""
    mine = json.dumps(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": _place(),
            "start": _start(os.getpid()),
            "token": secrets.token_hex(8),
        }
    )
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        if not _abandoned(path):
            return None
        # Renamed first, to a unique name, so that two processes can't both remove it.
        stale = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, stale)
            os.unlink(stale)
        return None
    with os.fdopen(handle, "w") as file:
        file.write(mine)
    _log.warning(f"this file system has no locks ({why}): {path} serves as one")
    return _kept_alive(path, mine)


def _kept_alive(path: Path, mine: str) -> Release:
    ended = threading.Event()

    def keep_fresh() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=keep_fresh, name="folder lock", daemon=True)
    thread.start()

    def release_lock() -> None:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            if path.read_text() == mine:
                path.unlink()

    return release_lock


def _abandoned(path: Path) -> bool:
    """Whether the holder of a file is gone: by its process if it would be seen here, by its silence elsewhere."""
    try:
        holder, touched = json.loads(path.read_text()), path.stat().st_mtime
        place, pid, start = str(holder["place"]), int(holder["pid"]), str(holder["start"])
    except FileNotFoundError:
        return False  # released just now: the next try gets it
    except (OSError, ValueError, KeyError, TypeError):
        place, pid, start = "", 0, ""
        touched = path.stat().st_mtime if path.exists() else time.time()
    if place == _place():
        return _start(pid) != start
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        probe.touch()  # the file system's clock may differ from ours
        return probe.stat().st_mtime - touched > SILENT_SECONDS
    finally:
        probe.unlink(missing_ok=True)


def _place() -> str:
    """Where process ids mean the same as here: containers of one name may count their own, each from 1."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"


def _start(pid: int) -> str:
    """When a process was started, which tells it from a later one with its id; "" if it has ended."""
    try:
        state, *more = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else more[18]  # nobody may wait for it to be gone
