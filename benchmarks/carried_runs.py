"""What runs take along from one machine to the next, in order of importance, within a limit.

First the measurements of all runs; then, of runs that are not finished, what their finished stages leave to
the later ones (trained networks as weights only, without the optimizer's moments), and the last
checkpoint of the stage in progress; last the models of finished runs. A stage without those that it is
built on is of no use, so what follows one that does not fit is left behind as well.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file

from cnn2gnn_dist import durable, ledger
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder

LIST = "brought.json"
"""File next to the parts: their checksums, and what was left behind."""
STAGES = ("teacher", "targets", "student", "graph", "control", "evaluation")
"""Folders of the stages that are carried; those before them are repeated within seconds."""
MEASURED = ("config.yaml", "inputs.json", "results.json", "report.html")
OVERHEAD = 2048
"""Most bytes that a tar needs for a file besides its contents."""


@dataclass(frozen=True)
class Piece:
    """Files that travel together, by their names in the tar; ``chain``: the run whose later pieces need it, or ""."""

    name: str
    files: dict[str, Path]
    chain: str = ""

    @property
    def size(self) -> int:
        """At most so many bytes in a tar."""
        return sum(file.stat().st_size + OVERHEAD for file in self.files.values())


def is_finished(run: Path) -> bool:
    """Whether a run has its results and its model, or only its results have come here."""
    complete = ledger.finished(run / "model") is not None or not (run / "student").is_dir()
    return (run / "results.json").is_file() and complete


def pieces(runs: list[Path], scratch: Path) -> list[Piece]:
    """What could travel of these runs, the most important first; ``scratch``: a folder for copies."""
    runs = [run for run in runs if run.is_dir()]
    measured = [Piece(f"{run.name}'s measurements", dict(_measured(run))) for run in runs]
    stages = [one for run in runs if not is_finished(run) for one in _stages(run, scratch)]
    models = [
        Piece(f"{run.name}'s model", _whole(run, run / "model"))
        for run in runs
        if ledger.finished(run / "model") is not None
    ]
    return [*measured, *stages, *models]


def fitting(offered: list[Piece], limit: int) -> tuple[list[Piece], list[Piece]]:
    """Those that fit into so many bytes together, taken in turn, and those left behind."""
    taken: list[Piece] = []
    left: list[Piece] = []
    limit -= tarfile.RECORDSIZE  # a tar ends with zeros
    for piece in offered:
        useless = piece.chain and piece.chain in {one.chain for one in left}
        if useless or piece.size > limit:
            left.append(piece)
        else:
            taken.append(piece)
            limit -= piece.size
    return taken, left


def write(runs: list[Path], out: Path, scratch: Path, *, limit: int, part: int) -> list[str]:
    """Fill OUT with parts of at most ``part`` bytes, ``limit`` bytes together; return what was left behind."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("runs.tar.*"):
        old.unlink()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    taken, left = fitting(pieces(runs, scratch), limit)
    said = [f"{piece.name} ({piece.size / 1e6:.0f} MB)" for piece in left]
    joined, listed = scratch / "runs.tar", {}
    with tarfile.open(joined, "w") as tar:
        for piece in taken:
            for name, file in piece.files.items():
                tar.add(file, name)
    with joined.open("rb") as file:
        for number, content in enumerate(iter(lambda: file.read(part), b"")):
            name = f"runs.tar.{number:03d}"
            (out / name).write_bytes(content)
            listed[name] = hashlib.sha256(content).hexdigest()
    shutil.rmtree(scratch)
    (out / LIST).write_text(json.dumps({"parts": listed, "left": said}, indent=1))
    return said


def read(back: Path, to: Path) -> list[str]:
    """Restore the runs of an earlier OUT that the folder ``to`` does not have; return their names.

    Raises:
        SystemExit: a part is missing or damaged.
    """
    if not back.is_dir() or not any(back.iterdir()):
        return []
    if not (back / LIST).is_file():
        raise SystemExit(f"{back} holds no {LIST}: bring back all files of OUT")
    new = to / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    with (new / "runs.tar").open("wb") as file:
        for name, expected in json.loads((back / LIST).read_text())["parts"].items():
            content = (back / name).read_bytes() if (back / name).is_file() else b""
            if hashlib.sha256(content).hexdigest() != expected:
                raise SystemExit(f"{back / name} is not the file that was brought: bring it again")
            file.write(content)
    with tarfile.open(new / "runs.tar") as tar:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
        tar.extractall(new / "runs", **safely)
    restored = []
    for run in sorted((new / "runs").iterdir()):
        if not (to / run.name).exists():  # otherwise this machine still has it
            run.rename(to / run.name)
            restored.append(run.name)
    shutil.rmtree(new)
    return restored


def _measured(run: Path) -> Iterator[tuple[str, Path]]:
    """Small files; metrics lie next to the stages' folders: one with them alone would pass for a stale stage."""
    for name in MEASURED:
        if (run / name).is_file():
            yield f"{run.name}/{name}", run / name
    for stage in STAGES:
        for file in (run / stage / "metrics.jsonl", run / f"{stage}-metrics.jsonl"):
            if file.is_file():
                yield f"{run.name}/{stage}-metrics.jsonl", file
                break


def _stages(run: Path, scratch: Path) -> Iterator[Piece]:
    """The stages of a run in their order, as far as they have got."""
    for stage in STAGES:
        folder = run / stage
        entry = ledger.finished(folder)
        if entry is not None and not ledger.missing(folder, entry):
            kept = [name for name, _ in entry.outputs]
            metrics = ["metrics.jsonl"] if (folder / "metrics.jsonl").is_file() else []
            whole = [*kept, *metrics, ledger.DONE]
            files = {f"{run.name}/{stage}/{name}": folder / name for name in whole}
            checkpoint = checkpoint_folder.recorded(folder)
            if checkpoint is not None and checkpoint.parent == checkpoint_folder.root_of(folder):
                files = _as_weights(run, stage, checkpoint, scratch / run.name / stage, files)
            yield Piece(f"{run.name}'s {stage}", files, run.name)
        elif folder.is_dir():
            yield Piece(f"{run.name}'s {stage} in progress", _in_progress(run, folder), run.name)
            return


def _as_weights(
    run: Path, stage: str, checkpoint: Path, scratch: Path, files: dict[str, Path]
) -> dict[str, Path]:
    """The files of a finished training with the checkpoint as the later stages read it, and a record of that."""
    folder, entry = run / stage, ledger.finished(run / stage)
    assert entry is not None
    made = weights_only(checkpoint, scratch / checkpoint.relative_to(folder))
    inside = f"{run.name}/{checkpoint.relative_to(run)}/"
    files = {name: file for name, file in files.items() if not name.startswith(inside)}
    files |= {inside + file.name: file for file in made}
    before = [name for name, _ in entry.outputs if (folder / name).parent != checkpoint]
    outputs = [
        *ledger.outputs(scratch, made),
        *ledger.outputs(folder, [folder / n for n in before]),
    ]
    ledger.finish(scratch, replace(entry, outputs=tuple(outputs)))
    return files | {f"{run.name}/{stage}/{ledger.DONE}": scratch / ledger.DONE}


def weights_only(checkpoint: Path, to: Path) -> list[Path]:
    """Write a checkpoint with the same weights and buffers for inference, and nothing else; return its files."""
    to.mkdir(parents=True)
    tensors = checkpoint_folder.answering(checkpoint_folder.read_tensors(checkpoint))
    kept = {name: one.contiguous() for name, one in tensors.items() if name[:2] in ("w/", "b/")}
    names = sorted(checkpoint_folder.checksums(checkpoint))
    shares = [name for name in names if name.endswith(".safetensors")]
    save_file(kept, to / shares[0])
    for name in names:
        if name not in shares:
            shutil.copyfile(checkpoint / name, to / name)
    listed = [checkpoint_folder.describe(file) for file in sorted(to.iterdir())]
    content = {name: [size, sha] for name, size, sha in listed}
    manifest = {"format": checkpoint_folder.FORMAT, "files": content}
    durable.write_json(to / checkpoint_folder.MANIFEST, manifest)
    return sorted(to.iterdir())


def _in_progress(run: Path, folder: Path) -> dict[str, Path]:
    """All files of a stage, but of its checkpoints only the newest complete one."""
    root = checkpoint_folder.root_of(folder)
    complete = (
        one
        for one in reversed(checkpoint_folder.all_of(root))
        if checkpoint_folder.damage(one) is None
    )
    newest = next(complete, None)
    return {
        name: file
        for name, file in _whole(run, folder).items()
        if "tensorboard" not in file.parts
        and (root not in file.parents or file.parent in (root, newest))
    }


def _whole(run: Path, folder: Path) -> dict[str, Path]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(run.parent)): file for file in files}
