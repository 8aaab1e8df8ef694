"""Waiting for, inspecting and killing running processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil

from cnn2gnn_dist import durable
from tests.support.forks import Fork


def read_until(process: subprocess.Popen[str] | Fork, pattern: str) -> str:
    """Read the output up to the first line that matches."""
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return "".join(seen)
    raise AssertionError(f"{pattern!r} never came:\n{''.join(seen)[-4000:]}")


def reach(
    process: subprocess.Popen[str] | Fork, run: Path, stage: str, step: int | None = None
) -> None:
    """Wait until a training has logged this step; without a step, until it has a checkpoint."""
    path, latest = run / stage / "metrics.jsonl", run / stage / "checkpoints" / "latest"
    deadline = time.monotonic() + 400  # generous for a loaded machine

    def there() -> bool:
        if step is None:
            return latest.exists()
        return path.exists() and any(line["step"] >= step for line in durable.read_lines(path))

    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no {stage} step {step}:\n{process.communicate()[0][-4000:]}")
        time.sleep(0.005)


def ranks_of(process: subprocess.Popen[str] | Fork) -> list[psutil.Process]:
    """The rank processes of a launcher, in order."""
    children = psutil.Process(process.pid).children()
    forked = isinstance(process, Fork)  # torchrun has other kinds of children too
    ranks = [child for child in children if forked or "launch/train.py" in _command(child)]
    return sorted(ranks, key=lambda child: child.pid)


def _command(process: psutil.Process) -> list[str]:
    """The words of a process's command; none if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def frozen(process: subprocess.Popen[str] | Fork, name: str) -> list[psutil.Process]:
    """Stop (SIGSTOP) the descendants of this name where they are; returns them, for ``resume``."""
    family = psutil.Process(process.pid).children(recursive=True)
    found = []
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ends just now
            if child.name().startswith(name):
                child.suspend()
                found.append(child)
    assert found, [child.pid for child in family]
    return found


def kill_all(process: subprocess.Popen[str] | Fork) -> str:
    """Send SIGKILL to a process and all its descendants; return the rest of the output."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(ProcessLookupError):  # it has ended with its parent
            os.kill(member.pid, signal.SIGKILL)
    output = process.communicate()[0]
    psutil.wait_procs([m for m in family if isinstance(m, psutil.Process)])
    return output
