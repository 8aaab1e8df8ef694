"""Hosts on one machine, for tests as root: each with its own network, processes, mounts, name and IPC.

A host is a set of Linux namespaces that exists as long as a pipe is open: its process 1 waits for the
end of its stdin. When the test ends, raises or is killed by SIGKILL, the pipe closes, and the kernel
ends every process of the host, unmounts its file systems and removes its network interfaces::

    with network(2, keep=[tmp_path]) as (a, b):      # 10.77.0.1, 10.77.0.2; no way out
        share(tmp_path / "server", tmp_path / "shared", (a, b))
        process = a.start([sys.executable, ...], runs.environment(MASTER_ADDR=a.address))
        b.cut()
        b.restore()

Each host has its own /tmp and /dev/shm. Of the machine's /tmp it sees the checkout, the interpreter's
environment and the folders in ``keep``. Send signals for what a host has started to its whole session:
``os.killpg(process.pid, ...)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import REPOSITORY, TEMPORARY, short_folder
from tests.support.forks import Fork

NAMES = "abcdefgh"
NAMESPACES = ("ipc", "uts", "net", "pid", "mnt")  # mounts last: from then on /proc is the host's
UNSHARE = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc",
           "--kill-child"]  # fmt: skip
# With SIGCHLD ignored, orphans are reaped.
INIT = (
    "import os, signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.write(1, b'up\\n')\n"
    "while os.read(0, 4096): pass"
)


@functools.cache
def missing(*programs: str) -> str:
    """Why there can be no hosts here; empty if there can. ``programs`` are needed in addition."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are Linux namespaces, which only root can create"
    for program in ("unshare", "nsenter", "ip", "mount", *programs):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if "bindfs" in programs and not os.access("/dev/fuse", os.W_OK):
        return "/dev/fuse is missing"
    tried = subprocess.run([*UNSHARE, "ip", "link", "add", "br0", "type", "bridge"],
                           capture_output=True, text=True)  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def needed(*programs: str) -> pytest.MarkDecorator:
    """Skip tests where there can be no hosts, or where one of these programs is missing."""
    return pytest.mark.skipif(bool(missing(*programs)), reason=missing(*programs) or "-")


class Host:
    """One host, created by ``network``.

    Attributes:
        name: the host name.
        address: on the private network; empty for the switch.
    """

    def __init__(self, name: str, address: str = "", keep: Iterable[Path] | None = None) -> None:
        self.name, self.address = name, address
        self.switch: Host | None = None
        self.port = ""
        self._holder = subprocess.Popen([*UNSHARE, sys.executable, "-S", "-c", INIT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"up\n":
            raise RuntimeError(f"the host {name} did not start")
        task = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self.pid = int(task.read_text().split()[0])
        self.shell(
            f"hostname {name}; ip link set lo up; mount -t tmpfs -o mode=1777 tmpfs /dev/shm"
        )
        if keep is not None:
            self._own_temporary_folder(keep)

    def _own_temporary_folder(self, keep: Iterable[Path]) -> None:
        kept: list[Path] = []
        for path in sorted({Path(p).resolve() for p in keep}):
            if path.is_relative_to(TEMPORARY) and not any(path.is_relative_to(k) for k in kept):
                kept.append(path)
        binds = "".join(
            f"mkdir -p {p}; mount --rbind /mnt/{p.relative_to(TEMPORARY)} {p}\n" for p in kept
        )
        self.shell(
            f"mount --rbind {TEMPORARY} /mnt; mount -t tmpfs -o mode=1777,size=8g tmpfs {TEMPORARY}\n"
            f"{binds}umount --lazy /mnt; mkdir {TEMPORARY}/home"
        )

    def enter(self, command: Sequence[str], folder: Path = REPOSITORY) -> list[str]:
        """The command that runs ``command`` in this host, in ``folder``."""
        return ["nsenter", "-t", str(self.pid), "-a", f"--wdns={folder}", "--", *command]

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; options are those of ``subprocess.run``."""
        return subprocess.run(self.enter(command, Path("/")), text=True, **options)

    def shell(self, script: str) -> str:
        """Run a shell script that must not fail; return its output."""
        done = self.run(["sh", "-ec", script], capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {script}\n{done.stderr}")
        return done.stdout

    def start(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        folder: Path = REPOSITORY,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start a command in a session of its own, with stdout and stderr in one pipe."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
        return subprocess.Popen(self.enter(command, folder), env=environment, text=True,
            start_new_session=True, **pipes)  # fmt: skip

    def fork(
        self,
        job: Callable[..., int | None],
        arguments: tuple[Any, ...],
        environment: dict[str, str],
        folder: Path = REPOSITORY,
        output: Path | None = None,
    ) -> Fork:
        """Call ``job`` in a process of this host with the libraries preloaded (``forks.Fork``)."""
        inside = (self.pid, job, arguments, str(folder))
        return Fork(_inside, inside, environment, Path("/"), output)

    def cut(self) -> None:
        """Let the network drop everything from and to this host, which sees no change itself."""
        self._connect("nomaster")

    def restore(self) -> None:
        """End a ``cut``."""
        self._connect("master br0")

    def _connect(self, how: str) -> None:
        assert self.switch is not None
        self.switch.shell(f"ip link set {self.port} {how}")

    def down(self) -> None:
        """Take this host's own interface down: its processes get errors at once."""
        self.shell("ip link set eth0 down")

    def up(self) -> None:
        """End ``down``."""
        self.shell("ip link set eth0 up")

    def lose_power(self) -> None:
        """End every process of this host but its first, while nothing reaches the network; it may be used again."""
        self.cut()
        self.shell("kill -KILL -1")

    def mount(self, source: Path, at: Path) -> None:
        """Show the folder or file ``source`` of this machine at ``at`` in this host."""
        self.shell(f"mount --bind {source} {at}")

    def tmpfs(self, at: Path, size: str) -> None:
        """A file system of ``size`` (such as ``64m``) at the folder ``at`` of this host."""
        self.shell(f"mount -t tmpfs -o size={size} tmpfs {at}")

    def resolve(self, names: dict[str, str]) -> None:
        """Set the addresses, by host name, that this host finds in its /etc/hosts."""
        text = "".join(f"{address} {name}\n" for name, address in names.items())
        path = f"{TEMPORARY}/.hosts-{self.name}"
        self.shell(
            f"cat > {path} <<'END'\n127.0.0.1 localhost\n{text}END\nmount --bind {path} /etc/hosts"
        )

    def end(self) -> None:
        """End every process of this host, as a power cut would."""
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        try:
            self._holder.wait(10)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait()
        self._holder.stdout.close()


@contextlib.contextmanager
def network(count: int, keep: Iterable[Path] = ()) -> Iterator[tuple[Host, ...]]:
    """Hosts ``node-a``, ``node-b``, … on a private network that leads nowhere else.

    Args:
        count: of hosts; at most 8.
        keep: folders under /tmp that the hosts share with this machine.
    """
    seen = [REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), *keep]
    if data := os.environ.get("CNN2GNN_DATA"):
        seen.append(Path(data))
    with contextlib.ExitStack() as stack:
        switch = Host("switch")
        stack.callback(switch.end)
        switch.shell("ip link add br0 type bridge; ip link set br0 up")
        hosts = []
        for number in range(count):
            host = Host(f"node-{NAMES[number]}", f"10.77.0.{number + 1}", seen)
            stack.callback(host.end)
            host.switch, host.port = switch, f"p{number}"
            # Both ends are created inside, so neither is ever among this machine's interfaces.
            command = f"ip link add eth0 netns {host.pid} type veth peer name {host.port} netns {switch.pid}"
            subprocess.run(command.split(), check=True)
            switch.shell(f"ip link set {host.port} master br0; ip link set {host.port} up")
            host.shell(f"ip addr add {host.address}/24 dev eth0; ip link set eth0 up")
            hosts.append(host)
        for host in hosts:
            host.resolve({other.name: other.address for other in hosts})
        yield tuple(hosts)


def share(
    folder: Path, at: Path, hosts: Iterable[Host], cached_s: float = 0.0, reopened: bool = True
) -> None:
    """Serve ``folder`` to each of these hosts at ``at``, as a file server would to its clients.

    Each client has its own page cache, which others' writes don't change: as under NFS, pages are
    requested again only when a file is opened after its size or time has changed
    (close-to-open). Needs bindfs.

    Args:
        folder: of this machine; created.
        at: created; the same path in every host.
        hosts: the clients.
        cached_s: seconds for which a client caches names, including absent ones, and attributes.
        reopened: whether reopening a file shows others' writes; otherwise a page once seen stays.
    """
    for path in (folder, at):
        path.mkdir(parents=True, exist_ok=True)
    times = ",".join(f"{what}_timeout={cached_s:g}" for what in ("attr", "entry", "negative"))
    cache = "auto_cache" if reopened else "kernel_cache"
    for host in hosts:
        host.shell(
            f"bindfs --multithreaded --enable-lock-forwarding -o {cache},{times} {folder} {at}"
        )


def listening(host: Host) -> set[str]:
    """The addresses on which the processes of a host listen, from the kernel's own tables."""
    found = set()
    for line in host.shell("cat /proc/net/tcp /proc/net/tcp6").splitlines():
        words = line.split()
        if len(words) > 3 and words[3] == "0A":
            digits = words[1].partition(":")[0][-8:]  # IPv4-mapped addresses end with the IPv4 one
            mapped = len(words[1].partition(":")[0]) == 8 or "FFFF0000" in words[1]
            address = ".".join(str(int(digits[at : at + 2], 16)) for at in (6, 4, 2, 0))
            found.add(address if mapped else words[1])
    return found


class Listener(NamedTuple):
    """A socket that listens: on which address (``*``, ``0.0.0.0``: all) and port, and the process's name."""

    address: str
    port: int
    process: str


def listeners(host: Host) -> list[Listener]:
    """All TCP sockets of a host that listen."""
    found = []
    for line in host.shell("ss --no-header --listening --tcp --numeric --processes").splitlines():
        address, _, port = line.split()[3].rpartition(":")
        address = address.strip("[]").removeprefix("::ffff:")
        names = re.findall(r'\("([^"]*)",pid=', line) or ["?"]
        found += [Listener(address, int(port), name) for name in names]
    return found


def end_family(process: subprocess.Popen[str] | Fork) -> None:
    """Kill a process and everything that it has started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def fixtures(
    prepare: Callable[[tuple[Host, ...], Path], None] = lambda pair, folder: None,
) -> tuple[Any, Any]:
    """Fixtures of a module: ``folder, pair = hosts.fixtures(prepare)``.

    ``folder`` is a new one with a short path that all see; ``pair`` are two hosts on a network,
    for which ``prepare(pair, folder)`` has been called.
    """

    @pytest.fixture(scope="module")
    def folder() -> Iterator[Path]:
        with short_folder() as path:
            yield path

    @pytest.fixture(scope="module")
    def pair(folder: Path) -> Iterator[tuple[Host, ...]]:
        with network(2, keep=[folder]) as made:
            prepare(made, folder)
            yield made

    return folder, pair


def _inside(
    pid: int, job: Callable[..., int | None], arguments: tuple[Any, ...], folder: str
) -> int:
    """Enter a host's namespaces and call the job in a child: only children get new process ids."""
    libc = ctypes.CDLL(None, use_errno=True)
    handles = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    for name, handle in zip(NAMESPACES, handles, strict=True):
        if libc.setns(handle, 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns {name}")
        os.close(handle)
    os.chdir(folder)
    child = os.fork()
    if child == 0:
        return job(*arguments) or 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the group gets it: the child's reaction counts
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code
