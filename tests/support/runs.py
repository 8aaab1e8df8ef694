"""Small complete runs for tests: the digits, under every launcher, in well under a minute."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnn2gnn_dist import cli, launcher
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support import REPOSITORY
from tests.support.forks import Fork
from tests.support.ports import free_port

BIN = Path(sys.executable).parent
FORKED = "forked ranks"

MICRO = [
    "data.limit=400",
    "data.shard_size=64",
    "precision=float32",  # the same on every machine, and as the exported model answers
    "data.calibration=0",  # the tests count steps and images
    "views.size=16",
    "views.pad=1",
    "teacher.args={layers: [1, 1, 1, 1], channels: [8, 16, 16, 32]}",
    "teacher.epochs=2",
    "teacher.global_batch=32",
    "teacher.lr=0.005",
    "targets.views=2",
    "graph.dim=16",
    "graph.candidates=8",
    "graph.neighbours=4",
    "graph.sampling.fanouts=[6, 4]",
    "graph.partition.partitioner=ranges",  # repeatable in any container; tests/end_to_end/test_variants.py runs METIS
    "graph.start_epoch=1",
    "graph.refresh_epochs=1",
    "student.stem=conv3",
    "student.dim=32",
    "student.hidden=32",
    "student.label_dim=8",
    "student.epochs=3",
    "student.global_batch=32",
    "student.lr=0.005",
    "checkpoint.every_steps=4",
    "run.log_steps=1",
    "evaluate.gallery=6",
    "evaluate.timing_images=64",
]


OUTPUTS = (
    *("teacher", "targets", "student", "graph", "control"),
    *("evaluation", "results.json", "report.html", "model"),
)
"""What the stages leave in a run's folder, from the teacher on."""


SHARED_CORES = {"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "240"}
"""For a Ray next to other tests: otherwise its workers yield to all of them, and give up if they start too late, as
whoever starts a node does after 30 s."""


def environment(**more: str) -> dict[str, str]:
    """An environment with one thread per rank and without variables of an outer launcher or cluster."""
    env = {
        k: v for k, v in os.environ.items() if not re.match(r"RANK|WORLD_SIZE|LOCAL_RANK|RAY_", k)
    }
    env.update(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", RAY_USAGE_STATS_ENABLED="0")
    env["PATH"] = f"{BIN}:{env['PATH']}"
    env.update(SHARED_CORES)
    env.update(more)
    return env


def ray_environment() -> dict[str, str]:
    """An environment for runs that start Ray, which creates its own token."""
    return environment()


def bare_environment(home: Path) -> dict[str, str]:
    """A user's shell environment: a path and a home, and nothing that tests or launchers set."""
    home.mkdir(exist_ok=True)
    path = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": str(home), "PYTHONPATH": str(REPOSITORY), **SHARED_CORES}


def start(
    command: list[str], env: dict[str, str], cwd: Path = REPOSITORY
) -> subprocess.Popen[str] | Fork:
    """Start a command in its own process group, with stdout and stderr in one pipe."""
    if command[0] == FORKED:
        return Fork(launch_ranks, (int(command[1]), _train, command[2:]), env, cwd)
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str] | Fork, seconds: float = 600) -> tuple[int, str]:
    """Exit code and output."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {seconds} s:\n{output[-4000:]}") from None
    return process.returncode, output


def launch(run_dir: Path, *overrides: str, ranks: int = 2) -> list[str]:
    """Command for ``start`` of a run on this many ranks, forked with the libraries preloaded.

    The ranks are started, monitored and stopped as by torchrun, without the time that torchrun and each
    rank would spend on imports.
    """
    return [FORKED, str(ranks), "--config", "demo", *MICRO, f"run.dir={run_dir}", *overrides]


def torchrun(run_dir: Path, *overrides: str, ranks: int = 2) -> list[str]:
    """Command of a run under torchrun."""
    return [
        str(BIN / "torchrun"),
        *("--nproc_per_node", str(ranks), "--master_addr", "127.0.0.1"),
        *("--master_port", str(free_port()), "launch/train.py"),
        *("--config", "demo", *MICRO, f"run.dir={run_dir}", *overrides),
    ]


def alone(*arguments: str) -> tuple[int, str]:
    """Exit code and output of launch/train.py as a single process, forked as in ``launch``."""
    return finish(Fork(_train, (list(arguments),), environment(), REPOSITORY))


def cnn2gnn(*arguments: str, **environ: str) -> Fork:
    """Start a command of the package in a fork."""
    return Fork(cli.main, (list(arguments),), environment(**environ), REPOSITORY)


def copy_before(run: Path, copy: Path, stage: str) -> None:
    """Copy a finished run as it was when this stage began: the results of the stages before it stay complete."""
    left_out = OUTPUTS[OUTPUTS.index(stage) :]

    def of_later_stages(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == run and name in left_out]

    shutil.copytree(run, copy, ignore=of_later_stages)


def _train(arguments: list[str]) -> int:
    sys.argv = ["launch/train.py", *arguments]
    return launcher.main()


def launch_ranks(ranks: int, job: Callable[..., int], *arguments: Any) -> int:
    """Act as torchrun on one host: start the ranks; when one fails, stop the others and report it."""
    os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    alive = {}
    for rank in range(ranks):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            launcher.exit_now(job(*arguments))
        alive[child] = rank
    failed = 0
    while alive:
        child, status = os.waitpid(-1, 0)
        rank, code = alive.pop(child), os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = 1
            print(f"rank {rank} failed\n  exitcode  : {code}", flush=True)
            for other in alive:
                os.kill(other, signal.SIGTERM)
    return failed


def results(run_dir: Path) -> dict:
    """The results table of a run."""
    return json.loads((run_dir / "results.json").read_text())


def scores(run_dir: Path) -> dict[str, tuple[float, float]]:
    """Results that must not depend on the launcher: accuracy and calibration of each model."""
    table = results(run_dir)
    return {
        name: (table[name]["accuracy"], table[name]["ece"])
        for name in ("teacher", "student", "control_mlp")
    }


def trail(run_dir: Path, stages: tuple[str, ...] = ("teacher", "student", "control")) -> dict:
    """Results that must be bit-identical however often a run was killed: the metrics lines of each training
    (without times and memory), and its last weights, moments and buffers.
    """
    return {stage: (lines(run_dir / stage), weights(run_dir / stage)) for stage in stages}


def lines(folder: Path) -> list[dict]:
    """Metrics of a training, without the time-dependent ones."""
    text = (folder / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    clock = ("time", "images_per_s", "wait_share", "memory_mb")
    clock += ("slowest", "slowest_rank", "slowest_host")
    return [{k: v for k, v in line.items() if k not in clock} for line in found]


def weights(folder: Path) -> str:
    """Digest of the tensors in a training's last checkpoint."""
    last = disk.all_of(folder / "checkpoints")[-1]
    tensors = disk.read_tensors(last)
    found = hashlib.sha256(last.name.encode())
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()
