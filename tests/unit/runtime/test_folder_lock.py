"""One process at a time in a run's folder, on every rank, and where there are no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cnn2gnn_dist import ledger
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.pipeline import runner
from cnn2gnn_dist.runtime import collectives, folder_lock
from cnn2gnn_dist.runtime.ranks import Ranks
from tests.support import rank_group

HOLD = """
import sys, time
from pathlib import Path
from cnn2gnn_dist.runtime import folder_lock
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


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def refused_on(root: Path) -> tuple[str, int]:
    """What a rank is told, and that it can still take part in a collective."""
    ranks = Ranks(collectives.rank(), collectives.rank(), collectives.world_size())
    runner.LOCK_SECONDS = 0.2
    try:
        with runner._locked(root, ranks):
            return "let in", 0
    except UserError as error:
        return error.what, sum(collectives.all_gather_object(1))


@pytest.mark.slow
def test_a_taken_lock_is_every_ranks_error(tmp_path):
    process = holder(tmp_path / "run")
    try:
        found = rank_group.run(refused_on, 2, tmp_path / "run")
    finally:
        process.kill()
        process.wait()
    assert found == [("another process works in this folder", 2)] * 2
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


def test_where_there_are_no_locks_a_file_stands_for_one(tmp_path, no_locks, capsys):
    release = folder_lock.take(tmp_path / "run", 0)
    assert "No locks available" in capsys.readouterr().err
    with pytest.raises(UserError, match="another process"):
        folder_lock.take(tmp_path / "run", 0)
    release()
    assert not list(tmp_path.glob("*.held"))
    folder_lock.take(tmp_path / "run", 0)()


@pytest.mark.parametrize(("silent", "free"), [(0, False), (3600, True)])
def test_a_holder_on_another_host_is_gone_when_it_is_silent(tmp_path, no_locks, silent, free):
    held = tmp_path / ".run.lock.held"
    held.write_text(json.dumps({"host": "elsewhere", "pid": os.getpid()}))
    now = held.stat().st_mtime
    os.utime(held, (now - silent, now - silent))
    if free:
        folder_lock.take(tmp_path / "run", 1)()
    else:
        with pytest.raises(UserError, match="another process"):
            folder_lock.take(tmp_path / "run", 0)


def test_a_holder_says_that_it_is_alive(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.01)
    touched = []
    real = os.utime
    twice = threading.Event()

    def utime(path, *rest):
        touched.append(str(path))
        real(path, *rest)
        if len(touched) > 1:
            twice.set()

    monkeypatch.setattr(os, "utime", utime)
    release = folder_lock.take(tmp_path / "run", 0)
    assert twice.wait(60)
    release()
    assert set(touched) == {str(tmp_path / ".run.lock.held")}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written(tmp_path):
    root = tmp_path / "shared" / "run"
    root.mkdir(parents=True)
    root.parent.chmod(0o555)
    try:
        folder_lock.take(root, 0)()
        ledger.claim(root, "name: x\n")
        with pytest.raises(UserError, match="can't be written"):
            folder_lock.take(root.parent / "other", 0)
    finally:
        root.parent.chmod(0o755)


def test_a_lock_inside_does_not_make_a_folder_someone_elses(tmp_path):
    (tmp_path / ".lock").touch()
    ledger.claim(tmp_path, "name: x\n")
    assert (tmp_path / "config.yaml").exists()
