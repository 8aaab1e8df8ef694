"""Processes that live and die together, with their own ``/dev/shm``: a machine within a host.

Libraries that give shared memory the same names on every machine (DGL's servers) can't run twice
on a host unless each has its own mount namespace. So a supervisor, run by its path and without
torch (``python -P supervisor.py JSON``), opens one, starts the named processes in it, and ends
them all when one of them ends or when the process that asked for them does (a pipe on stdin
closes). Their shared memory goes with the last of them: nothing is left behind, however they end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
PR_SET_PDEATHSIG = 1
SHARED_MEMORY = "/dev/shm"
REFUSED = 77
"""Exit code of a supervisor that was not allowed to open a namespace."""
EXIT_SECONDS = 10.0
"""Seconds for a supervisor to exit after its pipe is closed."""


@dataclass(frozen=True)
class Spec:
    """Instructions for a supervisor.

    Attributes:
        commands: name → command line of each process.
        environment: name → variables added to this process's own environment.
        isolated: whether they run in their own mount namespace; else they share the host's.
        files: name → file descriptors that only this process inherits.
        log: file for their output; None: stderr.
    """

    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    isolated: bool = True
    files: Mapping[str, Sequence[int]] = field(default_factory=dict)
    log: str | None = None


class SupervisedProcesses:
    """Named processes under a supervisor, as seen by the process that needs them."""

    def __init__(self, spec: Spec) -> None:
        files = [number for numbers in spec.files.values() for number in numbers]
        self._supervisor = subprocess.Popen(
            [sys.executable, "-P", __file__, json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=files,
            text=True,
        )
        self.processes: dict[str, int] = {}
        """Process ids by name, filled by ``started``."""

    def started(self) -> bool:
        """Wait for the processes to exist; False if no namespace could be opened."""
        assert self._supervisor.stdout is not None
        line = self._supervisor.stdout.readline()
        if line.startswith("{"):
            self.processes = json.loads(line)
            return True
        return self._supervisor.wait() != REFUSED

    def first_exit(self) -> str:
        """Wait until a process ends; returns which one and how, in words. Call only once."""
        assert self._supervisor.stdout is not None
        with self._supervisor.stdout as said:
            return said.readline().strip() or "its supervisor exited"

    def end(self) -> None:
        """End all processes."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()
        try:
            self._supervisor.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()  # its children ask the kernel to die with it
            self._supervisor.wait()


def can_isolate() -> bool:
    """Whether the kernel lets this user open a mount namespace (root, or user namespaces)."""
    probe = SupervisedProcesses(Spec())
    allowed = probe.started()
    probe.end()
    probe.first_exit()
    return allowed


def main() -> int:
    """Supervise until a process ends or stdin closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the parent, whose end shows on stdin
    spec = Spec(**json.loads(sys.argv[1]))
    if spec.isolated:
        try:
            _isolate()
        except OSError:
            return REFUSED
    with open(spec.log, "ab") if spec.log else contextlib.nullcontext(sys.stderr) as log:
        running = {name: _start(spec, name, log) for name in spec.commands}
    _send(json.dumps({name: process.pid for name, process in running.items()}))
    try:
        _send(_first_exit(running))
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return 0


def _send(text: str) -> None:
    """Write a line to the parent, which may be gone."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{text}\n".encode())


def _isolate() -> None:
    """Enter a mount namespace with an empty /dev/shm; without privileges, in a user namespace.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS):
        _check(libc.unshare(CLONE_NEWNS | CLONE_NEWUSER))
        for path, text in (
            ("/proc/self/setgroups", "deny"),
            ("/proc/self/uid_map", f"{user} {user} 1"),
            ("/proc/self/gid_map", f"{group} {group} 1"),
        ):
            with open(path, "w", encoding="ascii") as file:
                file.write(text)
    _check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    _check(libc.mount(b"tmpfs", SHARED_MEMORY.encode(), b"tmpfs", 0, b"mode=1777"))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _start(spec: Spec, name: str, log: IO[Any]) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)
    own = list(spec.files.get(name, ()))
    process = subprocess.Popen(
        list(spec.commands[name]),
        env={**os.environ, **spec.environment.get(name, {})},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=own,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    for number in own:  # the parent must see a process's end as the closing of its files
        os.close(number)
    return process


def _first_exit(running: Mapping[str, subprocess.Popen[bytes]]) -> str:
    """Wait; returns which process ended and how, "" if the parent is gone or closed the pipe.

    Of several that have ended it is the first in the order of ``running``, whose end may be what ended the others.
    """
    names = {os.pidfd_open(process.pid): name for name, process in running.items()}
    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN | select.POLLHUP)
    for number in names:
        poll.register(number, select.POLLIN)
    ended = {number for number, _ in poll.poll()}
    if sys.stdin.fileno() in ended:
        return ""
    name = next(name for number, name in names.items() if number in ended)
    code = running[name].wait()
    how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
    return f"{name} {how}"


if __name__ == "__main__":
    sys.exit(main())
