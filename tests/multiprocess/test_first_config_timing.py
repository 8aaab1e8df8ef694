"""The processes in which `cnn2gnn init` times networks."""

from __future__ import annotations

import os
import time

import pytest

from cnn2gnn_dist import settings
from cnn2gnn_dist.commands.init import speed
from cnn2gnn_dist.errors import UserError


def _of_a_timing_process() -> tuple[int, bool]:
    return os.nice(0), speed.clock(speed._idle) is time.process_time


def test_a_machine_that_will_be_idle_is_timed_by_processor_time():
    """Otherwise by the clock, at the priority that Ray gives to ranks."""
    found = {}
    for idle in (False, True):
        with speed.Stopwatch(speed.Machine(1, 1, "cpu"), idle=idle) as stopwatch:
            found[idle] = stopwatch.pool.submit(_of_a_timing_process).result()
    own = os.nice(0)
    assert found == {False: (min(19, own + 15), False), True: (own, True)}


def test_a_timing_process_that_is_killed_is_named():
    config = settings.load("demo", [])
    with speed.Stopwatch(speed.Machine(1, 1, "cpu")) as stopwatch:
        stopwatch.pool.submit(os._exit, 9)
        with pytest.raises(UserError, match="was killed, probably because the memory is full"):
            stopwatch.time(config, 2, 100)
