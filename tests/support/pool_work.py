"""Work for the actors of ``runtime/ray/pool.py``, some of which kills the process that does it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError


def squaring(notes: Path, refuse: int | None = None) -> Callable[[int], int]:
    """Squares numbers; one divisible by 3 kills its process once, by 7 always; each call is recorded."""

    def square(number: int) -> int:
        if number == refuse:
            raise UserError("no such number", where=str(number), remedy="another number")
        with open(notes / str(number), "a") as file:
            file.write("x")
        calls = (notes / str(number)).stat().st_size
        if number % 7 == 0 or (number % 3 == 0 and calls == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    return square


def endless(notes: Path, once: bool = False) -> Callable[[int], int]:
    """Notes its process for an item, and never ends; with ``once`` the next call for the same item does."""

    def wait(number: int) -> int:
        note = notes / str(number)
        if once and note.exists():
            return number
        durable.write_text(note, str(os.getpid()))
        while True:
            time.sleep(1)

    return wait
