"""cluster/ray-cluster.yaml over ssh: `ray up` from a third host, then `ray down`, which leaves nothing on any host."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnn2gnn_dist.runtime.group import members
from tests.support import REPOSITORY, hosts, logins, short_folder
from tests.support.hosts import Host
from tests.support.runs import BIN, environment, finish

pytestmark = [hosts.needed("rsync", *logins.PROGRAMS), pytest.mark.ray]

HOME = Path("/tmp/home")  # each host has its own
PATIENT = "RAY_raylet_start_wait_time_s=240"
"""Ray's own 30 s are too few where many tests share two cores."""
SOONER = "RAY_gcs_rpc_server_reconnect_timeout_s=5"
"""For a worker: it ends when no head has answered for so long, by default a minute."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def three(folder: Path) -> Iterator[tuple[Host, ...]]:
    """Head, worker, and the host of whoever starts them."""
    with hosts.network(3, keep=[folder]) as made:
        logins.allow(made, folder, HOME)
        for host in made:
            host.shell(
                f"echo 'PATH=$HOME/.local/bin:$PATH' > {HOME}/.profile; touch {HOME}/.bashrc"
            )
        yield made


def three_lines(folder: Path, head: Host, worker: Host) -> Path:
    """The file of cluster/ with its three lines changed as a user would, and an environment that is already there."""
    text = (REPOSITORY / "cluster" / "ray-cluster.yaml").read_text()
    mine = {"head_ip": head.address, "worker_ips": f"[{worker.address}]", "ssh_user": "root"}
    for name, value in mine.items():
        text, changed = re.subn(
            rf"^( +{name}: ).*?  +# \d: ", rf"\g<1>{value}  # ", text, flags=re.M
        )
        assert changed == 1, name
    for old, new in {
        "&& make install": f"&& ln -sfn {sys.prefix} .venv",
        "RAY_enable_autoscaler_v2=0": f"RAY_enable_autoscaler_v2=0 {PATIENT}",
        "  - RAY_AUTH_MODE=token OMP_NUM": f"  - {PATIENT} {SOONER} RAY_AUTH_MODE=token OMP_NUM",
        "RAY_WORKER_TRIES=6": "RAY_WORKER_TRIES=2",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def ray(host: Host, *command: str) -> str:
    """What a command of Ray's launcher prints that is run on this host, in the checkout."""
    mine = environment(HOME=str(HOME), RAY_AUTH_MODE="token")
    code, output = finish(host.start([str(BIN / "ray"), *command], mine))
    assert code == 0, output[-4000:]
    return output


def running(host: Host) -> list[str]:
    """Command lines of all processes of a host, without those that each has: its first one, and the ssh server."""
    lines = host.shell("ps -ww -eo args --no-headers").splitlines()
    return [
        line for line in lines if not re.search(r"os\.read\(0, 4096\)|sshd|ps -ww -eo args", line)
    ]


def test_up_and_down(three: tuple[Host, ...], folder: Path) -> None:
    head, worker, user = three
    for host in three:
        assert host.shell(f"ssh {host.address} 'echo ~'").strip() == str(HOME)
    ray(user, "get-auth-token", "--generate")
    config = three_lines(folder, head, worker)
    ray(user, "up", "--yes", str(config))
    log = ["grep", "-q", "Ray runtime started", f"{HOME}/.ray/worker-{worker.name}.log"]
    assert members.wait_until(lambda: worker.run(log, capture_output=True).returncode == 0, 450), (
        head.shell("tail -n 50 /tmp/ray/session_latest/logs/monitor.*")
    )
    ray(user, "exec", str(config), "RAY_AUTH_MODE=token ~/.local/bin/ray status")
    ray(user, "down", "--yes", str(config))
    assert members.wait_until(lambda: not any(map(running, three)), 450), [*map(running, three)]
