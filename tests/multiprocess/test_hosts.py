"""The simulated hosts of the tests: separate where they must be, and gone when their test ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support import REPOSITORY, hosts, runs
from tests.support.hosts import Host

pytestmark = hosts.needed("bindfs")

SERVER = """
import socket
server = socket.create_server(("", 5000))
print("up", flush=True)
while True:
    server.accept()[0].sendall(b"here")
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[2])) as server:
    sys.exit(server.recv(4) != b"here")
"""
READER = """
import mmap, sys
file = open(sys.argv[1], "rb")
pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(pages[0], flush=True)
sys.stdin.readline()
print(pages[0], open(sys.argv[1], "rb").read(1)[0], flush=True)
"""
OWNER = """
import os, sys
from tests.support import hosts
with hosts.network(1) as (a,):
    a.start(["sleep", sys.argv[1]], dict(os.environ))
    print("up", flush=True)
    sys.stdin.read()
"""


folder, pair = hosts.fixtures()


def test_each_has_its_own_name_network_processes_and_temporary_files(
    pair: tuple[Host, ...], folder: Path
) -> None:
    (folder / "kept").write_text("yes")
    look = f"hostname; ls /tmp /dev/shm; ip -o link | wc -l; cat {folder}/kept; touch /tmp/mine"
    for host in pair:
        told = host.shell(look).split()
        assert told[0] == host.name != socket.gethostname()
        assert "home" in told
        assert "mine" not in told
        assert told[-2:] == ["2", "yes"]  # loopback and eth0
        processes = host.shell("ls /proc | grep -c '^[0-9]'")
        assert int(processes) < 10


def test_a_link_is_cut_and_restored(pair: tuple[Host, ...]) -> None:
    a, b = pair
    server = b.start([sys.executable, "-S", "-c", SERVER], runs.environment())

    def answers(seconds: int = 60) -> bool:
        command = [sys.executable, "-S", "-c", CLIENT, b.name, str(seconds)]
        return a.run(command, capture_output=True).returncode == 0

    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        assert answers()
        b.cut()
        assert not answers(1)
        b.restore()
        assert answers()
        b.down()
        assert not answers(1)
        b.up()
        assert answers()
    finally:
        hosts.end_family(server)


def test_clients_of_a_file_server_have_pages_of_their_own(
    pair: tuple[Host, ...], folder: Path
) -> None:
    """Otherwise the tests with these clients would prove nothing."""
    shared = folder / "shared"
    hosts.share(folder / "server", shared, pair)
    a, b = pair
    a.shell(f"head -c 8192 /dev/zero > {shared}/rows")
    reader = b.start(
        [sys.executable, "-S", "-c", READER, str(shared / "rows")],
        runs.environment(),
        stdin=subprocess.PIPE,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "0\n"
    a.shell(f"printf '\\007' | dd of={shared}/rows conv=notrunc,fsync status=none")
    output, _ = reader.communicate("\n")
    assert output.split() == ["0", "7"]


def describe_host(path: Path) -> int:
    path.write_text(
        json.dumps([socket.gethostname(), os.getpid() < 1000, sorted(psutil.net_if_addrs())])
    )
    return 3


def stop_itself(number: int) -> None:
    os.kill(os.getpid(), number)


def test_forks_run_inside(pair: tuple[Host, ...], folder: Path) -> None:
    for host in pair:
        fork = host.fork(describe_host, (folder / host.name,), runs.environment())
        assert fork.wait(60) == 3
        assert json.loads((folder / host.name).read_text()) == [host.name, True, ["eth0", "lo"]]
    for number in (signal.SIGKILL, signal.SIGTERM):
        fork = pair[0].fork(stop_itself, (number,), runs.environment())
        assert fork.wait(60) == -number


def test_hosts_end_with_their_owner() -> None:
    """A test that is killed leaves no process behind."""
    mark = str(7_000_000 + os.getpid())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, mark], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    everything = psutil.process_iter(["cmdline"])
    inside = [p for p in everything if (p.info["cmdline"] or [])[-2:] == ["sleep", mark]]
    assert inside
    owner.kill()
    owner.communicate()
    _, alive = psutil.wait_procs(inside, timeout=60)
    assert not alive
