"""One process at a time in a run's folder, for all ranks, even where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading

import pytest

from cnn2gnn_dist import ledger
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.shared_files import folder_lock


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_where_there_are_no_locks_a_file_stands_for_one(tmp_path, no_locks, capsys, console):
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
    held.write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "place": "elsewhere"}))
    now = held.stat().st_mtime
    os.utime(held, (now - silent, now - silent))
    if free:
        folder_lock.take(tmp_path / "run", 1)()
    else:
        with pytest.raises(UserError, match="another process"):
            folder_lock.take(tmp_path / "run", 0)


def test_a_holder_whose_process_id_another_process_has_now(tmp_path, no_locks):
    """A container that is started anew gives its processes the same ids: it would wait for itself forever."""
    folder_lock.take(tmp_path / "run", 0)
    held = tmp_path / ".run.lock.held"
    holder = json.loads(held.read_text())
    assert holder["pid"] == os.getpid()
    held.write_text(json.dumps(holder | {"start": "1"}))
    folder_lock.take(tmp_path / "run", 1)()


def test_a_holder_in_another_container_of_the_same_name(tmp_path, no_locks):
    """Its process is not seen here, but it is alive."""
    folder_lock.take(tmp_path / "run", 0)
    held = tmp_path / ".run.lock.held"
    held.write_text(json.dumps(json.loads(held.read_text()) | {"place": "other", "pid": 2**22}))
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
