"""Processes that are asked to stop and can't reach their next step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NoReturn

from cnn2gnn_dist import log
from cnn2gnn_dist.runtime import preemption

GRACE_S = 0.3


def _unreadable() -> tuple[str, str]:
    raise OSError("stale file handle")


def _hang() -> NoReturn:
    while True:
        signal.pause()


def asked_once(pipe: str) -> None:
    """The last message can't be made, or, with a pipe that nobody writes to, never is."""
    describe = (lambda: ("", Path(pipe).read_text())) if pipe else _unreadable
    with log.console(), preemption.deferred_stop(GRACE_S, describe):
        os.kill(os.getpid(), signal.SIGTERM)
        _hang()


def asked_again_and_again() -> None:
    """A request every few milliseconds."""

    def again(number: int, frame: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with log.console(), preemption.deferred_stop(GRACE_S, lambda: ("late", "and lost")):
        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S / 20, GRACE_S / 20)
        _hang()


def in_time() -> int:
    """The next step comes in time; 0 if the request is known."""
    with preemption.deferred_stop(600.0, _unreadable):
        os.kill(os.getpid(), signal.SIGTERM)
        while not preemption.stop_requested():
            signal.pause()
    return 0
