"""Graph versions: across processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support import REPOSITORY


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="a file system of one's own wants a mount namespace (root, unshare)",
)
def test_a_full_disk_leaves_the_version_before_in_use(tmp_path):
    """A real full disk: a tmpfs of 1 MiB, filled while arrays, a part and the manifest are written."""
    script = REPOSITORY / "tests/support/full_disk_graph.py"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "d").mkdir()
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, str(script), str(tmp_path / "d")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert [step for step, _, _ in said] == ["arrays", "a part", "the manifest"]
    for _, problem, newest in said:
        assert "disk full" in problem
        assert newest == "v0001"
