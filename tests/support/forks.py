"""Processes with the libraries preloaded: forks of a server that has already imported them.

A rank that starts an interpreter spends 3 s of CPU time on importing torch and 2 to 3 s on the imports
of its first optimizer step. For the several hundred ranks of a test run that adds up to half an hour. A
fork is a process like any other, with its own memory, signals and process group. Startup itself
(launchers, environments, Ray) is tested with real starts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TextIO

from tests.support import REPOSITORY

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.libraries"])


class Fork:
    """A process in its own session, with the subset of ``subprocess.Popen`` that the tests use.

    Args:
        job: a module-level function, called in the fork; its return value is the exit code.
        environment: the complete environment of the fork. The libraries were imported without it, so
            variables that they read on import (OMP_NUM_THREADS) are the server's.
        output: a file for stdout and stderr; None: a pipe, ``stdout``.
    """

    def __init__(
        self,
        job: Callable[..., int | None],
        arguments: tuple[Any, ...],
        environment: dict[str, str],
        cwd: Path,
        output: Path | None = None,
    ) -> None:
        context = fork_context()
        reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_main, args=(job, arguments, environment, str(cwd), writer, output)
        )
        self._process.start()
        writer.close()
        self.pid: int = self._process.pid or 0
        self.stdout: TextIO = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
        reader.close()

    @property
    def returncode(self) -> int | None:
        """Exit code, or the negative number of the signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Like ``Popen.poll``."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Like ``Popen.wait``."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """The rest of the output, after waiting for the process to exit."""
        import threading

        parts: list[str] = []
        thread = threading.Thread(target=lambda: parts.append(self.stdout.read()), daemon=True)
        thread.start()
        thread.join(timeout)
        if thread.is_alive():
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        self.wait(timeout)
        return "".join(parts), None

    def send_signal(self, number: int) -> None:
        """Send a signal to this process only."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


def fork_context() -> ForkServerContext:
    """The context of multiprocessing whose processes are forks of the server; it is set up to find
    the package and the tests.
    """
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(REPOSITORY) not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, known)])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return _CONTEXT


def _main(
    job: Callable[..., int | None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    cwd: str,
    writer: Any,
    output: Path | None,
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sink = writer.fileno() if output is None else os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(sink, stream)
    writer.close()
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    code = 1
    try:
        code = job(*arguments) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as in cnn2gnn_dist.launcher, and for the same reason
