"""A rank that Ray kills for memory: the group is restarted, and the reason is reported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import runs

pytestmark = pytest.mark.ray

KILLED_AT_ONCE = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "250"}
"""Ray's monitor kills a worker as soon as the machine uses more than a thousandth of its memory."""


def test_a_rank_that_is_killed_for_memory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cnn2gnn_dist", "run", "--config", "demo", *runs.MICRO]
    command += [f"run.dir={run}", "run.ranks=2", "cluster.max_failures=1", "cluster.wait_s=120"]
    process = runs.start(command, runs.ray_environment() | KILLED_AT_ONCE)
    code, output = runs.finish(process)
    assert code == 2, output[-4000:]
    assert "a rank was lost (" in output
    assert "restarting the group from the last checkpoint" in output
    [last] = [line for line in output.splitlines() if "lost a rank 2 times; last: " in line]
    assert "memory" in last.partition("last: ")[2], last
    assert "Traceback" not in output, output[-4000:]
