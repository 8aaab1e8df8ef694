"""``cnn2gnn … | head``: the reader goes before everything is printed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("also_stderr", [False, True])
def test_a_reader_that_has_gone_away_is_no_error(also_stderr: bool):
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run(
        [sys.executable, "-m", "cnn2gnn_dist", "config", "--config", "demo"],
        stdout=writes,
        stderr=writes if also_stderr else subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        timeout=600,
    )
    os.close(writes)
    assert ended.returncode == 141  # as a shell says it of a program that SIGPIPE ended
    assert not ended.stderr
