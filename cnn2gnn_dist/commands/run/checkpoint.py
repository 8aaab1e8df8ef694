"""``cnn2gnn checkpoint``: list, explain, verify and export training checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from cnn2gnn_dist import durable, settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.log import output
from cnn2gnn_dist.pipeline.keys import as_made
from cnn2gnn_dist.training.checkpoint import folder as disk

STAGES = ("teacher", "student", "control")
KINDS = {
    "w/": "weights",
    "a/": "weights averaged over steps",
    "m/": "first moments",
    "v/": "second moments",
    "b/": "buffers (mean)",
    "c/": "buffers averaged over steps",
}


def ls(place: Path) -> int:
    """Print a line for each checkpoint of a run, a stage or one folder; returns 0."""
    output(f"{'stage':8} {'checkpoint':14} {'epoch':>5} {'batch':>6} {'ranks':>5} {'MB':>9}  age")
    for folder in found_in(place):
        state = disk.read_state(folder)
        cursor, age = (
            state["extra"]["cursor"],
            time.time() - (folder / disk.MANIFEST).stat().st_mtime,
        )
        size = sum(path.stat().st_size for path in folder.iterdir())
        latest = disk.all_of(folder.parent)[-1] == folder
        marks = ["latest"] * latest + ["best"] * (disk.best_of(folder.parent) == folder)
        output(
            f"{_stage(folder):8} {folder.name:14} {cursor['epoch']:5} {cursor['batch']:6} "
            f"{state['world_size']:5} {size / 1e6:9.1f}  {_age(age)}  {' '.join(marks)}".rstrip()
        )
    return 0


def show(place: Path) -> int:
    """Explain one checkpoint: position of the training, contents, config; returns 0."""
    folder = one_of(place)
    state = disk.read_state(folder)
    cursor, best = state["extra"]["cursor"], state["extra"]["best"]
    output(f"checkpoint   {folder}")
    output(f"position     epoch {cursor['epoch']}, batch {cursor['batch']}, step {state['step']}")
    output(f"written by   {state['world_size']} ranks, ZeRO stage {state['zero_stage']}")
    output(
        f"best so far  {'not evaluated yet' if best is None else f'{best:.2%} on held-out images'}"
    )
    output(f"run          {state['run_id']}")
    for prefix, (tensors, numbers, size) in _contents(folder).items():
        output(f"{prefix:12} {tensors:5} tensors {numbers:13,} numbers {size / 1e6:9.1f} MB")
    output("config")
    for name, value in state["about"].items():
        output(f"  {name} = {json.dumps(value)}")
    return 0


def verify(place: Path) -> int:
    """Read everything and compare checksums; returns 1 if a checkpoint is damaged."""
    bad = 0
    for folder in found_in(place):
        problem = disk.damage(folder)
        bad += problem is not None
        output(f"{_stage(folder):8} {folder.name:14} {problem or 'complete'}")
    return 1 if bad else 0


def export(place: Path, out: Path) -> int:
    """Write weights and buffers into one safetensors file with plain names; returns 0.

    A teacher's names are those of its timm network; what else is needed to use it (mean and standard
    deviation of the images, class names, architecture) is in the file's metadata.

    Raises:
        UserError: no complete checkpoint; the file already exists, or can't be created.
    """
    folder = one_of(place)
    problem = disk.damage(folder)
    if problem is not None:
        raise UserError(
            f"this checkpoint is not complete: {problem}",
            where=str(folder),
            remedy=f"name another: `cnn2gnn checkpoint verify {folder.parent.parent}` shows which are complete",
        )
    if out.exists():
        raise UserError("the file already exists", where=str(out), remedy="another --out")
    durable.check_writable(out)
    weights, about = disk.load_weights(folder), _about(folder)
    if _stage(folder) == "teacher":
        weights = {n.removeprefix("cnn."): t for n, t in weights.items() if n.startswith("cnn.")}
    with durable.replacing(out) as partial:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial, about)
    numbers = sum(tensor.numel() for tensor in weights.values())
    output(f"{out}: {len(weights)} tensors, {numbers:,} numbers of {_stage(folder)} {folder.name}")
    return 0


COMMANDS: dict[str, Callable[[Path], int]] = {"ls": ls, "show": show, "verify": verify}


def found_in(place: Path) -> list[Path]:
    """The checkpoints of a run's folder, of a stage's, or the one folder itself; oldest first.

    Raises:
        UserError: there are none.
    """
    place = Path(place)
    roots = [disk.root_of(place / stage) for stage in STAGES]
    roots += [disk.root_of(place), place]
    found = [folder for root in roots for folder in disk.all_of(root)]
    if (place / disk.MANIFEST).is_file() or place.name.startswith("step-"):
        found = [place]
    if not found:
        raise UserError(
            "no checkpoint here",
            where=str(place),
            remedy="the folder of a run, of a stage in it (RUN/teacher), or a step-… folder",
        )
    return found


def one_of(place: Path) -> Path:
    """The checkpoint of a place, damaged or not: the one a finished stage recorded, or the newest.

    Raises:
        UserError: there is none, or there are checkpoints of several stages.
    """
    found = found_in(place)
    stages = list(dict.fromkeys(_stage(folder) for folder in found))
    if len(stages) > 1:
        raise UserError(
            f"checkpoints of several stages here: {', '.join(stages)}",
            where=str(place),
            remedy=f"name one: {Path(place) / stages[0]}",
        )
    return disk.recorded(found[-1].parent.parent) or found[-1] if len(found) > 1 else found[0]


def _stage(folder: Path) -> str:
    """The stage in RUN/STAGE/checkpoints/step-NUMBER."""
    return folder.absolute().parent.parent.name


def _contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Tensors, numbers and bytes of each kind; reads headers only."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                numbers = 1
                for side in part.get_shape():
                    numbers *= side
                width = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}.get(part.get_dtype(), 8)
                kind = found.setdefault(KINDS.get(name[:2], "buffers (own)"), [0, 0, 0])
                kind[0] += 1
                kind[1] += numbers
                kind[2] += numbers * width
    return {name: (a, b, c) for name, (a, b, c) in sorted(found.items())}


def _about(folder: Path) -> dict[str, str]:
    """Metadata of an export: safetensors stores text only."""
    from cnn2gnn_dist.data.index.manifest import Manifest

    state, run = disk.read_state(folder), folder.absolute().parents[2]
    about: dict[str, Any] = {"format": "pt", "stage": _stage(folder), "step": state["step"]}
    if (run / "config.yaml").is_file():
        config = as_made(settings.load(str(run / "config.yaml")), run, _stage(folder))
        views, manifest = config.views, run / "manifest" / "train.arrow"
        about |= {"image_size": views.size, "mean": views.mean, "std": views.std}
        about["arch"] = config.teacher.arch if _stage(folder) == "teacher" else config.student.stem
        if manifest.is_file():
            about["classes"] = Manifest.load(manifest).classes
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
