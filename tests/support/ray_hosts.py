"""A Ray cluster on hosts that are namespaces (``tests.support.hosts``): a head on the first, workers on the others."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support import runs
from tests.support.hosts import Host, end_family
from tests.support.runs import BIN
from tests.support.watching import read_until

PORT = 6379
WORKER_PORTS = range(10002, 20000)
"""On which Ray's own servers in workers listen, by default."""


class RayHosts:
    """A cluster as if a user had started it, whose head declares a silent node dead within about 40 s.

    Attributes:
        environment: for its processes and a driver, with the cluster's token.
        nodes: the process of each node, in the order in which they were started.
    """

    def __init__(self, members: Sequence[Host], folder: Path) -> None:
        self.members = members
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = runs.environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_memory_monitor_refresh_ms="0",
            RAY_health_check_period_ms="1000",
            RAY_health_check_timeout_ms="5000",
            RAY_health_check_failure_threshold="6",
            HOME="/tmp/home",
        )
        self.address = f"{members[0].address}:{PORT}"
        self.nodes: list[subprocess.Popen[str]] = []

    def start(self, cpus: Sequence[int]) -> None:
        """Start the nodes, with this many CPUs on each host."""
        for host, count in zip(self.members, cpus, strict=True):
            self.start_node(host, count)

    def start_node(self, host: Host, cpus: int) -> None:
        """Start the node on a host; on one that had a node before, another one."""
        head = ["--head", "--port", str(PORT), "--include-dashboard=false"]
        role = head if host is self.members[0] else ["--address", self.address]
        command = [str(BIN / "ray"), "start", "--block", *role, "--num-cpus", str(cpus)]
        command += ["--node-ip-address", host.address, "--object-store-memory", "100000000"]
        node = host.start(command, self.environment)
        self.nodes.append(node)
        read_until(node, "Ray runtime started")

    def run(self, *arguments: str) -> subprocess.Popen[str]:
        """Start ``cnn2gnn run`` on this cluster, from the first host."""
        command = [str(BIN / "python"), "-m", "cnn2gnn_dist", "run", *arguments]
        command += [f"cluster.address={self.address}"]
        return self.members[0].start(command, self.environment)


@contextlib.contextmanager
def started(members: Sequence[Host], folder: Path, cpus: Sequence[int]) -> Iterator[RayHosts]:
    """A Ray cluster on these hosts, which share ``folder``. It ends with the hosts at the latest."""
    cluster = RayHosts(members, folder)
    try:
        cluster.start(cpus)
        yield cluster
    finally:
        for node in cluster.nodes:
            end_family(node)
