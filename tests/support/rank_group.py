"""Run a test's function in several processes that form one gloo group on loopback.

A case is a module-level function, passed by name rather than pickled, so that every rank imports its
module. Ranks get pickled arguments and return a pickled value through files.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import REPOSITORY
from tests.support.forks import Fork
from tests.support.ports import free_port

GROUP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """The result of one rank: exit code (negative: the signal), value or error, output."""

    returncode: int
    value: Any
    output: str


def run(case: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 600) -> list:
    """Return the values of ``case(*arguments)`` on ranks 0, 1, …; fail with their output on any error."""
    outcomes = launch(case, world_size, *arguments, timeout=timeout)
    failed = [(r, o) for r, o in enumerate(outcomes) if o.returncode != 0]
    text = "\n".join(f"--- rank {r}: exit code {o.returncode}\n{o.output}" for r, o in failed)
    assert not failed, f"{case.__name__} failed\n{text}"
    return [outcome.value for outcome in outcomes]


def launch(
    case: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = 600,
    group_timeout_s: float = GROUP_TIMEOUT_S,
) -> list[Outcome]:
    """Like ``run``, but accept any outcome of the ranks; no rank outlives this call."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = (case.__module__, case.__name__, arguments, group_timeout_s)
        (folder / "job").write_bytes(pickle.dumps(job))
        ranks = [_start(folder, rank, world_size, port) for rank in range(world_size)]
        try:
            deadline = time.monotonic() + timeout
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed below, exit code -9
                for process in ranks:
                    process.wait(max(deadline - time.monotonic(), 0.1))
        finally:
            for process in ranks:
                _kill_family(process)
        return [outcome(folder, rank, process) for rank, process in enumerate(ranks)]


def _start(folder: Path, rank: int, world_size: int, port: int) -> Fork:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(REPOSITORY),
    }
    return Fork(main, (folder,), environment, cwd=folder, output=folder / f"{rank}.out")


def _kill_family(process: Fork) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(folder: Path, rank: int, process: Fork) -> Outcome:
    """What a rank has left in the folder of its job."""
    path = folder / f"{rank}.value"
    value = pickle.loads(path.read_bytes()) if path.exists() else None
    output = (folder / f"{rank}.out").read_text(encoding="utf-8", errors="replace")
    return Outcome(process.returncode, value, output[-6000:])


def main(folder: Path) -> None:
    """Run one rank: join the group, run the case, write the value."""
    from cnn2gnn_dist.runtime.ranks import Ranks
    from cnn2gnn_dist.training import engine

    module, name, arguments, timeout_s = pickle.loads((folder / "job").read_bytes())
    ranks = Ranks.from_environment()
    engine.init(ranks, "cpu", timeout_s=timeout_s)
    value = getattr(importlib.import_module(module), name)(*arguments)
    path = folder / f"{ranks.rank}.value"
    path.with_suffix(".tmp").write_bytes(pickle.dumps(value))
    os.replace(path.with_suffix(".tmp"), path)
    engine.shutdown()
