"""Python in its own mount namespace: a test's small or read-only file system exists for it alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.support import REPOSITORY

needed = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="a file system of one's own wants a mount namespace (root, unshare)",
)
"""Skips tests where no mount namespace can be created."""


def run(*arguments: str) -> Any:
    """Run Python with these arguments; return its last line, parsed as JSON."""
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
