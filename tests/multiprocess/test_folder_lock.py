"""One process at a time in a run's folder, for all ranks, even without locks in the file system: across processes."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.pipeline import runner
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.shared_files import folder_lock
from tests.support import rank_group

HOLD = """
import sys, time
from pathlib import Path
from cnn2gnn_dist.runtime.shared_files import folder_lock
if sys.argv[2] == "no locks":
    import errno, fcntl
    def flock(*_): raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
folder_lock.take(Path(sys.argv[1]), 0)
print("held", flush=True)
time.sleep(600)
"""


def holder(root: Path, how: str = "") -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(root), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def refused_on(root: Path) -> tuple[str, int]:
    """The error on a rank, and whether it can still take part in a collective."""
    runner.LOCK_SECONDS = 0.2
    try:
        with runner._locked(root):
            return "let in", 0
    except UserError as error:
        return error.what, sum(collectives.all_gather_object(1))


def test_a_taken_lock_is_every_ranks_error(tmp_path):
    process = holder(tmp_path / "run")
    try:
        found = rank_group.run(refused_on, 2, tmp_path / "run")
    finally:
        process.kill()
        process.wait()
    assert found == [("another process is using this folder", 2)] * 2
    assert rank_group.run(refused_on, 2, tmp_path / "run") == [("let in", 0)] * 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("how", ["", "no locks"])
def test_the_lock_goes_with_its_holder(tmp_path, monkeypatch, how, number):
    if how:
        monkeypatch.setattr(fcntl, "flock", _refuse)
    process = holder(tmp_path / "run", how)
    with pytest.raises(UserError, match="another process"):
        folder_lock.take(tmp_path / "run", 0)
    process.send_signal(number)
    process.wait()
    folder_lock.take(tmp_path / "run", 1)()


def _refuse(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")
