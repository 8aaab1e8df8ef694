"""How users' environments affect startup: across processes."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ranks import DEFAULT_PORT
from cnn2gnn_dist.runtime.ray import probe as ray_probe
from tests.support import rank_group, runs
from tests.support.ports import free_port


def own_sockets() -> list[str]:
    """Addresses on which this rank listens, once the group has communicated."""
    from cnn2gnn_dist.runtime.group import collectives

    collectives.all_gather_object(os.getpid())
    return listening_at(psutil.Process())


def listening_at(process: psutil.Process) -> list[str]:
    found = process.net_connections("inet")
    return [one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN]


def test_no_rank_listens_beyond_the_rendezvous_address():
    for rank, found in enumerate(rank_group.run(own_sockets, 2)):
        assert found, f"rank {rank} listens nowhere: the test looks at nothing"
        assert set(found) == {"127.0.0.1"}


def test_a_ray_that_does_not_start_is_reported_in_a_line(tmp_path):
    """Here because a path is too long for its sockets, which a session normally avoids."""
    place = tmp_path / ("x" * 90)
    place.mkdir()
    script = f"""
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ray import cluster as ray_cluster, session as ray_session
ray_session.LONGEST_FOLDER = {len(str(place)) + 40}
try:
    ray_cluster.start(None, 1)
except UserError as error:
    print(error)
"""
    env = runs.bare_environment(tmp_path) | {"RAY_TMPDIR": str(place)}
    code, output = runs.finish(runs.start([sys.executable, "-c", script], env))
    assert code == 0, output
    assert "Ray failed to start on this host: " in output
    assert "AF_UNIX path length" in output
    assert "Traceback" not in output
    assert list(place.iterdir()) == []


@pytest.mark.ray
def test_a_cluster_says_which_token_it_wants(ray_cluster, monkeypatch, tmp_path):
    import ray

    address = ray.get_runtime_context().gcs_address
    assert ray_probe.cluster_mode(address, "cluster.address") == "token"
    with monkeypatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with pytest.raises(UserError, match="rejects this user's token") as caught:
            ray_probe.cluster_mode(address, "cluster.address")
        assert caught.value.remedy.startswith("unset RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH, and save")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="requires a token, but there is none here") as caught:
        ray_probe.cluster_mode(address, "cluster.address")
    assert str(tmp_path / "none") in caught.value.where
    assert caught.value.remedy.startswith("unset RAY_AUTH_TOKEN_PATH, and save")


@pytest.mark.ray
def test_the_clusters_token_is_in_no_command_and_no_log(ray_cluster):
    """Every user of a host can read the command lines of its processes, and logs are shown to others."""
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    token = path.read_text().encode()
    commands = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has exited since
            commands.append(process.cmdline())
    assert any("raylet" in word for words in commands for word in words)
    assert not any(token in word.encode() for words in commands for word in words)
    logs = [p for p in (path.parent / "t").rglob("*") if p.is_file()]
    assert any(p.name.startswith("raylet") for p in logs)
    assert [p for p in logs if token in p.read_bytes()] == []


@pytest.mark.parametrize("held_by", ["RAY_ADDRESS", "cluster.address", "GLOO_SOCKET_IFNAME"])
def test_a_run_that_can_go_nowhere_ends_before_anything_is_started(tmp_path, held_by):
    value = "nothing9" if held_by.startswith("GLOO") else f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "cnn2gnn_dist", "teacher", "--config", "demo", "device=cpu"]
    command += [f"run.dir={tmp_path / 'run'}"]
    env = runs.bare_environment(tmp_path)
    if held_by == "cluster.address":
        command += [f"{held_by}={value}"]
    else:
        env[held_by] = value
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    what = "names no network interface" if value == "nothing9" else "no Ray cluster answers"
    assert what in done.stderr
    assert f"where:  {held_by}={value}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Ray's logs were kept" not in done.stderr
    assert not (tmp_path / ".ray").exists()


def test_a_bug_ends_a_rank_although_a_thread_waits_forever():
    """Such as a reader whose file server is gone; the launcher would wait for the rank until its time limit."""
    code = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from cnn2gnn_dist import launcher
from cnn2gnn_dist.pipeline import runner
def run_rank(**_):
    ThreadPoolExecutor(1).submit(threading.Event().wait)
    raise ValueError("a bug")
runner.run_rank = run_rank
sys.argv = ["launch/train.py", "--config", "demo"]
launcher.exit_now(launcher.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "ValueError: a bug" in done.stderr


def test_a_single_process_needs_no_port(tmp_path):
    """Another process listens on the launchers' default port."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("0.0.0.0", DEFAULT_PORT))
            taken.listen()
        except OSError:
            pass  # another process listens there
        command = [sys.executable, "launch/train.py", "--stages", "pack,index,teacher"]
        command += ["--config", "demo", *runs.MICRO, "data.limit=100", "data.holdout=0.2"]
        command += ["teacher.epochs=1", "device=cpu", f"run.dir={tmp_path / 'run'}"]
        code, output = runs.finish(runs.start(command, runs.bare_environment(tmp_path)))
    assert code == 0, output[-3000:]
    assert (tmp_path / "run" / "teacher" / "done.json").is_file()
