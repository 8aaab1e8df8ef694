"""Work on many names, several at a time, in threads that don't keep a failed process alive."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

AT_ONCE = 8
"""Threads at the same time: files transferred together."""


def each(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Do the work for all names, several at a time; after an error for no others: raises it when all have ended.

    A store that is lost would otherwise be asked for every name in turn, each time until the last retry.
    Threads are daemons, unlike those of an executor: a process that has failed does not stay alive until
    everything is uploaded, or until the last retry on a silent store has failed.
    """
    left, errors = deque(names), dict[str, BaseException]()

    def run() -> None:
        with contextlib.suppress(IndexError):
            while not errors:
                name = left.popleft()
                try:
                    work(name)
                except BaseException as error:
                    errors[name] = error

    threads = [
        threading.Thread(target=run, name=f"transfer {number}", daemon=True)
        for number in range(min(AT_ONCE, len(names)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        if name in errors:
            raise errors[name]
