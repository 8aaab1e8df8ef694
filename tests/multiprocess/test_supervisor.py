"""Processes that run and end together, with their own shared memory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from cnn2gnn_dist.runtime.supervisor import Spec, SupervisedProcesses, can_isolate

WAIT = ["sleep", "600"]
isolated = pytest.mark.skipif(
    not can_isolate(), reason="this kernel refuses this user a mount namespace"
)
ASK = "from cnn2gnn_dist.runtime.supervisor import can_isolate; print(can_isolate())"


PRINT = "import os, sys; print('said'); os.write(int(sys.argv[1]), os.environ['NAME'].encode())"


def shell(text: str) -> list[str]:
    return ["sh", "-c", text]


def gone(pids: Iterable[int]) -> bool:
    """Whether all these processes exit within a minute."""
    family = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            family.append(psutil.Process(pid))
    return not psutil.wait_procs(family, timeout=60)[1]


@pytest.mark.parametrize(("how", "said"), [
    ("exit 3", "second exited with code 3"), ("kill -9 $$", "second was killed by signal 9")])  # fmt: skip
def test_the_end_of_one_is_named_and_ends_the_others(how, said):
    made = SupervisedProcesses(Spec({"first": WAIT, "second": shell(how)}, isolated=False))
    assert made.started()
    assert made.first_exit() == said
    assert gone(made.processes.values())
    made.end()


def test_of_several_that_ended_the_first_is_named():
    made = SupervisedProcesses(Spec({"first": WAIT, "second": WAIT}, isolated=False))
    assert made.started()
    supervisor = made._supervisor.pid
    os.kill(supervisor, signal.SIGSTOP)
    for name in ("second", "first"):
        os.kill(made.processes[name], signal.SIGKILL)
        while psutil.Process(made.processes[name]).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)  # the supervisor names one of those that have ended when it looks
    os.kill(supervisor, signal.SIGCONT)
    assert made.first_exit() == "first was killed by signal 9"
    made.end()


def test_all_end_when_they_are_no_longer_wanted():
    made = SupervisedProcesses(Spec({"first": WAIT, "second": WAIT}, isolated=False))
    assert made.started()
    made.end()
    assert not any(psutil.pid_exists(pid) for pid in made.processes.values())


def test_all_end_with_a_supervisor_that_is_killed():
    made = SupervisedProcesses(Spec({"first": WAIT, "second": WAIT}, isolated=False))
    assert made.started()
    psutil.Process(made.processes["first"]).parent().kill()
    assert made.first_exit() == "its supervisor exited"
    assert gone(made.processes.values())
    made.end()


def test_all_end_with_the_asker(tmp_path):
    """A rank ended by SIGKILL closes nothing itself; the kernel does."""
    lines = (
        "import os, json; from cnn2gnn_dist.runtime.supervisor import SupervisedProcesses, Spec",
        f"m = SupervisedProcesses(Spec({{'a': {WAIT}, 'b': {WAIT}}}, isolated=False)); m.started()",
        "print(json.dumps(m.processes), flush=True); os.kill(os.getpid(), 9)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == -9
    left = json.loads(done.stdout).values()
    assert len(left) == 2
    assert gone(left)


@isolated
def test_shared_memory_is_the_machines_own():
    """Two machines write the same name; the host sees neither file."""
    name = f"cnn2gnn-test-{os.getpid()}"
    write = shell(f"test ! -e /dev/shm/{name} && echo x > /dev/shm/{name} && exec sleep 600")
    machines = [SupervisedProcesses(Spec({"writer": write})) for _ in range(2)]
    assert all(made.started() for made in machines)
    for made in machines:
        seen = Path(f"/proc/{made.processes['writer']}/root/dev/shm/{name}")
        while not seen.exists():
            assert psutil.pid_exists(made.processes["writer"])
    assert not Path(f"/dev/shm/{name}").exists()
    for made in machines:
        made.end()


def test_what_they_print_goes_to_the_log_and_files_to_their_owner(tmp_path):
    log = tmp_path / "log.txt"
    read, write = os.pipe()
    spec = Spec(
        commands={"owner": [sys.executable, "-c", PRINT, str(write)], "other": WAIT},
        environment={"owner": {"NAME": "mine"}, "other": {}},
        isolated=False,
        files={"owner": [write]},
        log=str(log),
    )
    made = SupervisedProcesses(spec)
    os.close(write)
    assert made.started()
    with os.fdopen(read) as file:
        assert file.read() == "mine"  # ends with EOF: no other process has the other end open
    assert made.first_exit().startswith("owner exited")
    made.end()
    assert "said" in log.read_text()


@isolated
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_without_privileges_a_user_namespace_does():
    bare = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    done = subprocess.run([*bare, sys.executable, "-c", ASK], capture_output=True, text=True)
    if "setpriv" in done.stderr:
        pytest.skip("capabilities can't be dropped here")
    assert done.stdout.strip() == "True", done.stderr


@isolated
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (util-linux)")
def test_a_kernel_that_refuses_is_recognized():
    """Here a user namespace whose limits allow no further namespaces."""
    limits = (
        "echo 0 > /proc/sys/user/max_mnt_namespaces; echo 0 > /proc/sys/user/max_user_namespaces"
    )
    inner = shell(f'{limits}; exec "$0" -c "$1"')
    done = subprocess.run(
        ["unshare", "-Ur", *inner, sys.executable, ASK], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
