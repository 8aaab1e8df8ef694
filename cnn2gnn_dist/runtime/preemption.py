"""A request to stop soon (SIGTERM, SIGUSR1, `ray job stop`): training saves and exits.

Training saves within two steps. Outside it the request ends the process at once: every other stage
resumes where it was.
A rank that can't reach its next step, because a peer hangs, reports it and exits after its grace
period.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cnn2gnn_dist.errors import first_line
from cnn2gnn_dist.runtime import bounded_wait

_log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 128 + signal.SIGTERM
"""Exit code of a process that stopped on request."""
DESCRIBE_S = 2.0
"""Seconds for the last message: it names a file, and a lost file server may be why the step is late."""

_stop_requested = threading.Event()


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the process that started this one dies (Linux).

    A killed launcher would otherwise leave its ranks running and holding the run's folder.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def request_stop() -> None:
    """Request a stop from within this process (Ray's ranks get no signals)."""
    _stop_requested.set()


def stop_requested() -> bool:
    """Whether this process has been asked to stop."""
    return _stop_requested.is_set()


def ignore_stop() -> None:
    """Ignore SIGTERM from now on: this process is about to report an error and to end.

    A launcher sends it to all ranks as soon as one has ended.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def deferred_stop(grace_s: float, describe: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Within this block a request to stop is recorded instead of ending the process.

    Args:
        grace_s: seconds from a signal after which the process exits all the same.
        describe: says what did not come in time, and what is then lost or kept, for the last message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # The byte is written at once, even while the main thread waits in a collective.
    earlier_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    earlier = {number: signal.signal(number, _record) for number in SIGNALS}
    watch = threading.Thread(target=_watch, args=(reading, grace_s, describe), daemon=True)
    watch.start()
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier_fd)
        os.close(writing)  # ends the thread
        watch.join()
        os.close(reading)


def _record(number: int, frame: FrameType | None) -> None:
    _stop_requested.set()


def _watch(reading: int, grace_s: float, describe: Callable[[], tuple[str, str]]) -> None:
    """Wait for a signal's byte, then for the end of the block; exit if it doesn't come."""
    deadline: float | None = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([reading], [], [], left)
        if not ready:
            late, kept = _described(describe)
            _log.error(f"{late} within {grace_s:g} s of the request to stop, {kept}")
            os._exit(STOPPED)
        data = os.read(reading, 64)
        if not data:
            return
        if deadline is None and any(number in SIGNALS for number in data):
            deadline = time.monotonic() + grace_s  # of the first: asking again gives no more time


def _described(describe: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """What ``describe`` says, if it does: the process has to exit in any case."""
    try:
        return bounded_wait.result(describe, DESCRIBE_S)
    except Exception as error:
        return "no step finished", f"and what is saved can't be read: {first_line(error)}"
