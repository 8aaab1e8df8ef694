"""The order: across processes."""

from __future__ import annotations

import subprocess
import sys

from tests.support.runs import environment


def test_ranks_that_do_not_fit_leave_no_trace(tmp_path):
    command = [sys.executable, "launch/train.py", "--config", "demo", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*command, "graph.partition.parts=65"], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2
    assert "65 partitions share a global batch of 64: less than one sample each" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
