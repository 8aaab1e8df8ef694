"""Checks with complete runs under torchrun: the demo on one rank and on all, a kill, an evaluation on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from free_ports import free_port
from gpu_checking import Outcome, Setting, Skip

from cnn2gnn_dist.training.checkpoint import folder as disk

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LEAST = 90.0
"""Accuracy in percent that teacher and student of the demo must reach on any device (docs/results.md: 98)."""
NEAR = 0.05
"""Allowed difference between weights of a resumed and an uninterrupted training where devices add atomically."""
TOY = [
    "data.limit=400", "data.shard_size=64", "views.size=16", "views.pad=1",
    "teacher.args={layers: [1, 1, 1, 1], channels: [8, 16, 16, 32]}", "teacher.epochs=2",
    "teacher.global_batch=32", "graph.dim=16", "graph.candidates=8", "graph.neighbours=4",
    "graph.sampling.fanouts=[6, 4]", "graph.start_epoch=1", "student.stem=conv3", "student.dim=32",
    "student.hidden=32", "student.label_dim=8", "student.epochs=2", "student.global_batch=32",
    "checkpoint.every_steps=4", "run.log_steps=1", "evaluate.gallery=6", "evaluate.timing_images=64",
]  # fmt: skip


def pipeline(setting: Setting) -> Outcome:
    """The demo, every stage; resumed if an earlier attempt was interrupted."""
    run = setting.out / f"run-{setting.ranks}"
    begin = time.monotonic()
    launch(setting, run)
    table = results(run)
    teacher, student = table["teacher"]["accuracy"], table["student"]["accuracy"]
    percent = [100 * value if max(teacher, student) <= 1 else value for value in (teacher, student)]
    return Outcome(
        setting.toy or min(percent) >= LEAST,
        f"{setting.ranks} ranks: teacher {percent[0]:.2f} %, student {percent[1]:.2f} %, "
        f"{time.monotonic() - begin:.0f} s",
        {"teacher": percent[0], "student": percent[1]},
    )


def judged_on_cpu(setting: Setting) -> Outcome:
    """The models of the one-rank demo, evaluated on the CPU, have the same FLOPs and accuracy."""
    run, copy = setting.out / "run-1", setting.out / "run-1-cpu"
    if not (run / "results.json").is_file():
        raise Skip("the demo on one rank has no results")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    for name in ("evaluation", "results.json"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    launch(setting, copy, "device=cpu", "--stages", "evaluate", ranks=1)
    here, there = results(run)["student"], results(copy)["student"]
    scale = 100 if max(here["accuracy"], there["accuracy"]) <= 1 else 1
    apart = scale * abs(here["accuracy"] - there["accuracy"])
    ratio = here["flops"] / there["flops"]
    return Outcome(
        apart <= 1.0 and abs(ratio - 1) < 0.01,
        f"student {scale * here['accuracy']:.2f} %, on the CPU {scale * there['accuracy']:.2f} %; "
        f"FLOPs {ratio:.3f}x",
        {"accuracy_apart": apart, "flops_ratio": ratio},
    )


def resume(setting: Setting) -> Outcome:
    """A teacher killed by SIGKILL after its first checkpoint, then resumed, equals an uninterrupted one."""
    calm, killed = setting.out / "calm", setting.out / "killed"
    shutil.rmtree(killed, ignore_errors=True)
    only = ("--stages", "pack,index,teacher", "checkpoint.every_steps=4")
    launch(setting, calm, *only, ranks=1)
    process = start(setting, killed, *only, ranks=1)
    try:
        checkpoints = killed / "teacher" / "checkpoints"
        while process.poll() is None and not (checkpoints.is_dir() and disk.all_of(checkpoints)):
            time.sleep(0.05)
        cut_off = process.poll() is None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    launch(setting, killed, *only, ranks=1)
    found, wanted = (_weights(run) for run in (killed, calm))
    same = all(torch.equal(found[name], wanted[name]) for name in wanted)
    weights = [name for name in wanted if name.startswith("w/")]
    gap = sum(float((found[n].double() - wanted[n].double()).square().sum()) for n in weights)
    size = sum(float(wanted[n].double().square().sum()) for n in weights)
    apart = (gap / size) ** 0.5
    exact = setting.device == "cpu"
    return Outcome(
        cut_off and found.keys() == wanted.keys() and (same or (not exact and apart < NEAR)),
        ("bit-identical" if same else f"weights {apart:.1e} apart")
        + ("" if cut_off else "; was not interrupted"),
        {"same": same, "apart": apart},
    )


CHECKS: dict[str, Callable[[Setting], Outcome]] = {
    "pipeline": pipeline,
    "judged_on_cpu": judged_on_cpu,
    "resume": resume,
}


def results(run: Path) -> dict[str, Any]:
    """The results that a run has left."""
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def start(setting: Setting, run: Path, *more: str, ranks: int) -> subprocess.Popen[str]:
    """Start launch/train.py under torchrun, in a separate process group."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Skip("No module named 'deepspeed'")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "launch/train.py",
        "--config", "demo", *(TOY if setting.toy else []), f"device={setting.device}",
        "graph.partition.partitioner=ranges", f"run.dir={run}", *more,
    ]  # fmt: skip
    outside = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in outside}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(setting: Setting, run: Path, *more: str, ranks: int | None = None) -> None:
    """Do the same, and wait for its end.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    process = start(setting, run, *more, ranks=ranks or setting.ranks)
    try:
        output, _ = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"launch/train.py: exit code {process.returncode}\n{output[-3000:]}")


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return disk.read_tensors(disk.all_of(run / "teacher" / "checkpoints")[-1])
