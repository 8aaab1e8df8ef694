"""A request to stop ends a process within its grace period, whatever it waits for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnn2gnn_dist.runtime import preemption
from tests.support import REPOSITORY, runs, stops
from tests.support.forks import Fork


def ended(job: Callable[..., int | None], *arguments: Any) -> tuple[int, str]:
    return runs.finish(Fork(job, arguments, runs.environment(), REPOSITORY), seconds=120)


@pytest.mark.parametrize("server", ["answers with an error", "does not answer"])
def test_a_last_message_that_cannot_be_made_keeps_no_process(tmp_path: Path, server: str) -> None:
    """What was saved last is read from the run's folder, whose file server may be gone."""
    pipe = ""
    if server == "does not answer":
        pipe = str(tmp_path / "pipe")
        os.mkfifo(pipe)
    code, output = ended(stops.asked_once, pipe)
    assert code == preemption.STOPPED
    assert "no step finished within 0.3 s of the request to stop, and what is saved can't" in output


def test_asking_again_gives_no_more_time() -> None:
    code, output = ended(stops.asked_again_and_again)
    assert code == preemption.STOPPED
    assert "late within 0.3 s of the request to stop, and lost" in output


def test_a_step_in_time_goes_on() -> None:
    assert ended(stops.in_time)[0] == 0
