"""One checkpoint on disk: its contents, how it becomes visible, and whether it is complete.

``step-00000123/`` holds, for each rank that wrote it, ``rank-R-of-N.safetensors`` (its share of the
named tensors) and ``rank-R-of-N.json`` (state that belongs to that rank alone), then ``state.json``
and ``manifest.json`` with every file's size and SHA-256. It is written as ``step-00000123.tmp`` and
renamed once all of it is on disk; a folder without a valid manifest does not count. An existing one
of the same step is first renamed aside (``step-00000123.old``), never removed before the new one is
in place. Nothing here needs DeepSpeed, a process group or pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cnn2gnn_dist import durable, ledger
from cnn2gnn_dist.errors import UserError

FORMAT = 2
MANIFEST, STATE, LATEST, BEST = "manifest.json", "state.json", "latest", "best"
ASIDE = ".old"
"""Name suffix of a checkpoint being replaced by one of the same step, until that one is in place."""

File = tuple[str, int, str]
"""Name, bytes, SHA-256."""


def root_of(stage_folder: Path) -> Path:
    """Folder of a stage's checkpoints."""
    return Path(stage_folder) / "checkpoints"


def path_of(root: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` optimizer steps."""
    return Path(root) / f"step-{step:08d}"


def all_of(root: Path) -> list[Path]:
    """Folders that look like checkpoints, oldest first."""
    return sorted(path for path in Path(root).glob("step-????????") if path.is_dir())


def describe(path: Path) -> File:
    """Describe a complete file as the manifest lists it."""
    return path.name, path.stat().st_size, durable.sha256(path)


def publish(work: Path, final: Path, state: dict[str, Any], files: Iterable[File]) -> None:
    """Turn a folder in which all shares are on disk into the checkpoint ``final``, by an atomic rename."""
    durable.write_json(work / STATE, state)
    listed = {name: [size, sha] for name, size, sha in (*files, describe(work / STATE))}
    durable.write_json(work / MANIFEST, {"format": FORMAT, "files": listed})
    durable.sync(work)
    aside = final.with_name(final.name + ASIDE)
    if final.exists():  # corrupt; or complete, and saved again with another cursor at the same step
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(work, final)
    durable.sync(final.parent)
    durable.write_text(final.parent / LATEST, final.name)
    shutil.rmtree(aside, ignore_errors=True)


def recover(root: Path) -> None:
    """Finish what a kill interrupted while a step was published again.

    Keeps the new checkpoint if it is complete on disk, else the old one that had been renamed aside.
    """
    for aside in Path(root).glob(f"step-????????{ASIDE}"):
        final = aside.with_name(aside.name.removesuffix(ASIDE))
        work = final.with_name(final.name + ".tmp")
        with contextlib.suppress(OSError):  # read-only: nothing is published here either
            if not final.exists() or damage(final) is not None:
                best = next((p for p in (work, aside) if damage(p) is None), None)
                if best is None:
                    continue
                shutil.rmtree(final, ignore_errors=True)
                os.rename(best, final)
            shutil.rmtree(aside, ignore_errors=True)


def damage(folder: Path, elsewhere: Collection[str] = ()) -> str | None:
    """Read a checkpoint completely; return what is wrong with it, or None if it is complete.

    ``elsewhere``: names of files that may be missing here, because they can be fetched.
    """
    try:
        if MANIFEST in elsewhere and not (folder / MANIFEST).is_file():
            return None
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items()
        for name, (size, sha) in files:
            path = folder / name
            if not path.is_file():
                if name in elsewhere:
                    continue
                return f"{name} is missing"
            if path.stat().st_size != size or durable.sha256(path) != sha:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no valid manifest ({error})"
    return None


def manifest_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's manifest, or None: its files are not looked at."""
    try:
        checksums(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no valid manifest ({error})"
    return None


def checksums(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of the files of a complete checkpoint."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {str(name): (int(size), str(sha)) for name, (size, sha) in files.items()}


def recorded(stage_folder: Path) -> Path | None:
    """The final checkpoint of a finished training, as recorded in its ``done.json``; else None."""
    entry = ledger.finished(Path(stage_folder))
    names = [name for name, _ in entry.outputs] if entry else []
    found = {Path(name).parent for name in names if Path(name).name == MANIFEST}
    return Path(stage_folder) / found.pop() if len(found) == 1 else None


def best_of(root: Path) -> Path | None:
    """The checkpoint that ``best`` names, if it exists."""
    try:
        path = Path(root) / (Path(root) / BEST).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return path if (path / MANIFEST).is_file() else None


def prune(root: Path, newest: Path, keep_last: int) -> None:
    """Keep ``keep_last`` checkpoints up to ``newest``, and the best.

    Incomplete saves are deleted. So are corrupt checkpoints newer than ``newest``: a run that fell back to
    an earlier one must not count them.
    """
    folders, best = all_of(root), best_of(root)
    past = [folder for folder in folders if folder.name <= newest.name]
    future = [folder for folder in folders if folder.name > newest.name and damage(folder)]
    incomplete = [*Path(root).glob("step-*.tmp"), *Path(root).glob(f"step-*{ASIDE}")]
    for old in [*past[:-keep_last], *future, *incomplete]:
        if old != best:
            shutil.rmtree(old)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the contents of ``state.json``.

    Raises:
        UserError: it is missing, or has another format.
    """
    path = Path(folder) / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        written = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"this is not a checkpoint: {error}",
            where=str(path),
            remedy="name a step-… folder; `cnn2gnn checkpoint ls` lists them",
        ) from None
    if written != FORMAT:
        raise UserError(
            f"this checkpoint has format {written}, but this version reads format {FORMAT}",
            where=str(folder),
            remedy="use the version of cnn2gnn-dist that wrote it, or another run.dir=…",
        )
    return state


def read_owns(folder: Path) -> list[dict[str, Any]]:
    """The private state of each rank that wrote the checkpoint, in rank order."""
    names = sorted(name for name in _names(folder) if name.startswith("rank-"))
    return [
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in names
        if name.endswith(".json")
    ]


def seconds_of(folder: Path) -> float:
    """Seconds of training behind a checkpoint, over all attempts; 0: it is not recorded."""
    owns = read_owns(folder)
    return float(owns[0].get("seconds", 0.0)) if owns else 0.0


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors, by prefixed name (see ``named_state``).

    Raises:
        UserError: a file can't be read.
    """
    tensors: dict[str, Tensor] = {}
    for name in _names(folder):
        if name.endswith(".safetensors"):
            try:
                tensors.update(load_file(folder / name))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"this checkpoint file can't be read: {error}",
                    where=str(folder / name),
                    remedy="remove the folder and run again: training resumes from the previous one",
                ) from None
    return tensors


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights and buffers of a checkpoint as a plain state dict, without DeepSpeed.

    These are the ones for inference: averages over the steps if training kept them.
    """
    tensors = answering(read_tensors(Path(folder)))
    return {name[2:]: tensor for name, tensor in tensors.items() if name[:2] in ("w/", "b/")}


def answering(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The named tensors with averages over the steps, if any, in place of weights and buffers.

    Each rank's own buffers are left out, averages or not: inference uses the mean over the ranks.
    """
    averages = {
        {"a/": "w/", "c/": "b/"}[name[:2]] + name[2:]: tensor
        for name, tensor in tensors.items()
        if name[:2] in ("a/", "c/")
    }
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("own-")}
    return {**kept, **averages}


def _names(folder: Path) -> list[str]:
    """The files in the manifest; other files in the folder are ignored."""
    return list(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
