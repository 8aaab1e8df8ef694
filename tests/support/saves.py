"""Checkpoints of a tiny training, shared by the tests of saving and of failing saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder
from cnn2gnn_dist.training.checkpoint import named_state
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from cnn2gnn_dist.training.engine import Engine
from tests.support import tiny

RUN = "teacher-abc"
HALF, END = 3, 6


def extra(step: int) -> dict[str, Any]:
    return {"cursor": {"epoch": 1, "batch": step}, "corrupt": {"7": "shard, key"}}


def state(engine: Engine) -> str:
    """Digest of weights, both moments, buffers and Adam's step count."""
    tensors, step = named_state.pull(engine, lambda name: True)
    return f"{step:.0f} {tiny.digest(tensors)}"


def uninterrupted(root: Path, stage: int) -> dict[str, Any]:
    """Run six steps with a checkpoint after each from the second on; return the state to compare."""
    engine = tiny.build(stage)
    saved = Checkpoints(root / str(stage), RUN, keep_last=2)
    losses = tiny.train(engine, range(HALF - 1))
    found: dict[str, Any] = {}
    for step in range(HALF - 1, HALF + 1):
        found["own buffers"] = {n: b.clone() for n, b in engine.module.named_buffers()}
        saved.save(step, engine, extra(step), {"rank": collectives.rank()})
        saved.settle()
        if step < HALF:
            losses += tiny.train(engine, range(step, step + 1))
    found["state"] = state(engine)
    found["next"] = tiny.train(engine, range(HALF, END))
    found["last"] = state(engine)
    return found


def first_run(root: Path) -> dict[int, dict[str, Any]]:
    """Two ranks train and save in every stage."""
    return {stage: uninterrupted(root, stage) for stage in tiny.STAGES}


def newest(folder: Path) -> Path:
    found = Checkpoints(folder, RUN).latest()
    assert found is not None
    return found


def publish(saved: Checkpoints, step: int, **fields: Any) -> None:
    """Publish a checkpoint without tensors, through the real publisher."""
    final = saved.folder / f"step-{step:08d}"
    work = final.with_name(final.name + ".tmp")
    work.mkdir(parents=True)
    head: dict[str, Any] = {"format": 2, "run_id": RUN, "step": step, "extra": {}, **fields}
    checkpoint_folder.publish(work, final, head, [])
    assert json.loads((final / "state.json").read_text())["step"] == step
