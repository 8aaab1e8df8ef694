"""Work on many names in threads: after an error nothing further is begun."""

from __future__ import annotations

import threading

import pytest

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime import in_threads

NAMES = [str(number) for number in range(100)]


def test_all_names_are_worked_on_once() -> None:
    done: list[str] = []
    in_threads.each(done.append, NAMES)
    assert sorted(done) == sorted(NAMES)


def test_a_lost_store_is_not_asked_for_every_name() -> None:
    """Each request gives up after minutes, and a graph's version has hundreds of files."""
    asked: list[str] = []

    def lost(name: str) -> None:
        asked.append(name)
        raise UserError(f"no answer for {name}")

    with pytest.raises(UserError, match="no answer for 0"):
        in_threads.each(lost, NAMES)
    assert 1 <= len(asked) <= in_threads.AT_ONCE


def test_what_has_begun_ends_first() -> None:
    ended, failed = [], threading.Event()

    def work(name: str) -> None:
        if name == "1":
            failed.set()
            raise UserError("no")
        failed.wait()
        ended.append(name)

    with pytest.raises(UserError, match="no"):
        in_threads.each(work, ["0", "1"])
    assert ended == ["0"]
