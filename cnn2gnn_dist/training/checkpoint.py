"""Sharded, atomic checkpoints of named tensors: any world size and any ZeRO stage reads them.

``step-000123/`` holds each rank's share as safetensors, ``state.json`` and ``manifest.json``
with every file's size and SHA-256. It is written as ``step-000123.tmp`` and renamed by rank 0
when all shares are on disk; a folder without a valid manifest does not exist.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.training import distributed, named_state
from cnn2gnn_dist.training.engine import Engine

FORMAT = 1
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"


class Checkpoints:
    """The checkpoints of one stage of one run.

    Args:
        folder: where they lie; made on the first save.
        run_id: what they belong to; others are refused.
        keep_last: how many are left.
    """

    def __init__(self, folder: Path, run_id: str, keep_last: int = 2) -> None:
        self.folder, self.run_id, self.keep_last = Path(folder), run_id, keep_last

    def save(self, step: int, engine: Engine, extra: dict[str, Any]) -> Path:
        """Write the state after ``step`` optimizer steps (collective).

        ``extra`` (JSON) must be the same on all ranks. Buffers are averaged first.
        """
        rank, world_size = distributed.rank(), distributed.world_size()
        final = self.folder / f"step-{step:08d}"
        work = final.with_name(final.name + ".tmp")
        if rank == 0:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        distributed.barrier()
        engine.average_buffers()
        share = _shares(engine, world_size)
        tensors, optimizer_step = named_state.pull(engine, lambda name: share[name] == rank)
        path = work / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
        save_file({k: t.contiguous() for k, t in tensors.items()}, path)
        durable.sync(path)
        record = (path.name, path.stat().st_size, durable.sha256(path))
        files = distributed.all_gather_object(record)
        if rank == 0:
            state = {
                "format": FORMAT,
                "run_id": self.run_id,
                "step": step,
                "optimizer_step": optimizer_step,
                "extra": extra,
            }
            _publish(work, final, state, files)
            self._prune(final)
        distributed.barrier()
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint; a damaged one is named on stderr and passed over."""
        for folder in sorted(self.folder.glob("step-????????"), reverse=True):
            problem = _damage(folder)
            if problem is None:
                return folder
            print(f"checkpoint {folder.name} is passed over: {problem}", file=sys.stderr)
        return None

    def load(self, engine: Engine) -> dict[str, Any] | None:
        """Set the engine to the newest whole checkpoint; its ``extra``, or None (collective).

        Raises:
            UserError: the checkpoint belongs to another run, or to another architecture.
        """
        found = self.latest() if distributed.rank() == 0 else None
        path: Path | None = distributed.broadcast_object(found)
        if path is None:
            return None
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UserError(
                f"this checkpoint has format {state['format']}, we know {FORMAT}",
                where=str(path),
                remedy="the version of cnn2gnn-dist that wrote it, or another run.dir=…",
            )
        if state["run_id"] != self.run_id:
            raise UserError(
                "this checkpoint belongs to another run or config",
                where=str(path),
                remedy="another run.dir=…, or --update to start this stage anew",
            )
        tensors = _read(path)
        _check_shapes(engine, tensors, path)
        named_state.push(engine, tensors, state["optimizer_step"])
        engine.steps = int(state["step"])
        engine.deepspeed.global_steps = engine.steps
        return state["extra"]

    def _prune(self, newest: Path) -> None:
        """Leave ``keep_last`` up to ``newest``; clear away torn saves and a damaged future."""
        folders = sorted(self.folder.glob("step-????????"))
        past = [folder for folder in folders if folder.name <= newest.name]
        # A run that fell back behind a damaged checkpoint must not count that one.
        future = [folder for folder in folders if folder.name > newest.name and _damage(folder)]
        for old in [*past[: -self.keep_last], *future, *self.folder.glob("step-*.tmp")]:
            shutil.rmtree(old)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Weights and buffers of a checkpoint as a plain state dict; no DeepSpeed needed."""
    return {
        name[2:]: tensor for name, tensor in _read(Path(path)).items() if name[:2] in ("w/", "b/")
    }


def _shares(engine: Engine, world_size: int) -> dict[str, int]:
    """Which rank writes which tensor: the largest first, each to the rank with the fewest bytes."""
    sizes = {name: 3 * _elements(p) for name, p in engine.module.named_parameters()}
    sizes.update({name: b.numel() for name, b in engine.module.named_buffers()})
    load = [0] * world_size
    share = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        share[name] = load.index(min(load))
        load[share[name]] += sizes[name]
    return share


def _elements(parameter: Any) -> int:
    """Elements of the whole parameter; ZeRO-3 leaves an empty tensor and ``ds_numel``."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _publish(
    work: Path, final: Path, state: dict[str, Any], files: list[tuple[str, int, str]]
) -> None:
    _write_json(work / STATE, state)
    path = work / STATE
    files = [*files, (STATE, path.stat().st_size, durable.sha256(path))]
    _write_json(
        work / MANIFEST,
        {"format": FORMAT, "files": {name: [size, sha] for name, size, sha in files}},
    )
    durable.sync(work)
    if final.exists():
        shutil.rmtree(final)
    os.replace(work, final)
    durable.write_text(final.parent / LATEST, final.name)
    durable.sync(final.parent)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no valid manifest ({error})"
    for name, (size, sha) in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or durable.sha256(path) != sha:
            return f"{name} is damaged"
    return None


def _read(path: Path) -> dict[str, Tensor]:
    names = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name.endswith(".safetensors"):
            try:
                tensors.update(load_file(path / name))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"this checkpoint file can't be read: {error}",
                    where=str(path / name),
                    remedy="remove the folder: the one before it is then used",
                ) from None
    return tensors


def _check_shapes(engine: Engine, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = {
        "w/" + name: tuple(getattr(p, "ds_shape", p.shape))
        for name, p in engine.module.named_parameters()
    }
    wanted.update({"b/" + name: tuple(b.shape) for name, b in engine.module.named_buffers()})
    there = {n: tuple(t.shape) for n, t in tensors.items() if n[:2] in ("w/", "b/")}
    for name in dict.fromkeys([*wanted, *there]):
        if wanted.get(name) != there.get(name):
            raise UserError(
                f"the checkpoint does not fit the model at {name[2:]}: shape "
                f"{there.get(name, 'absent')} saved, {wanted.get(name, 'absent')} wanted",
                where=str(path),
                remedy="the config of the run that wrote it, or another run.dir=…",
            )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    durable.sync(path)
