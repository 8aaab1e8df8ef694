"""``cnn2gnn predict --out FOLDER/``: a file of answers per shard, over the ranks, resumable.

Every rank takes every so-many-th input: under torchrun, DeepSpeed's launcher or srun, or all of them in
a single process. A file of answers is complete or absent; one that is there, and newer than its input, is
skipped, so the same command resumes what was interrupted. The ranks need no group: none waits for another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn2gnn_dist import durable
from cnn2gnn_dist.commands.answer_files import KINDS, writer_of
from cnn2gnn_dist.commands.opening import opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import artefact
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.log import output, progress, report_error, set_rank
from cnn2gnn_dist.runtime.ranks import Ranks

NOTE = "answers.json"
"""In the folder: the model and the options that its answers are of."""
NEIGHBOURS = 5


def command(
    model: Path,
    images: Sequence[str],
    folder: Path,
    *,
    kind: str = ".parquet",
    top: int = 3,
    coverage: float | None = None,
) -> int:
    """Answer each input into a file of its own; returns 1 if some images could not be read.

    Args:
        model: folder of a model or of a finished run.
        images: shards, Parquet files, folders or images.
        folder: created if it is missing.
        kind: of the files: one of ``answer_files.KINDS``.
        top: classes listed for each image.
        coverage: also give sets of classes with this coverage.

    Raises:
        UserError: not a model; two inputs of one name; the folder has answers of another model.
    """
    ranks = Ranks.from_environment()
    if ranks.world_size > 1:
        set_rank(ranks.rank)
    targets = _targets(images, folder, kind)
    failed = done = 0
    with opened(model) as classifier:
        classifier.scoring.check_coverage(coverage, classifier.memory)
        durable.create_folder(folder)
        _check_note(folder, _note(classifier, top, coverage))
        mine = list(targets.items())[ranks.rank :: ranks.world_size]
        left = [(given, target) for given, target in mine if not _answered(given, target)]
        for given, target in progress(left, "predict", unit="shard", disable=not ranks.is_first):
            answers = classifier.stream([given], top=top, neighbours=NEIGHBOURS, coverage=coverage)
            with writer_of(target) as write:
                for answer in answers:
                    if answer.error is not None:
                        report_error(f"{answer.name}: not readable as an image: {answer.error}")
                        failed += 1
                    done += 1
                    write(answer)
    output(
        f"answers  {folder}: {done:,} images of {len(left)} inputs"
        + (f", {len(mine) - len(left)} inputs were there already" if len(left) < len(mine) else "")
    )
    return 1 if failed else 0


def _targets(images: Sequence[str], folder: Path, kind: str) -> dict[str, Path]:
    """The file of answers of each input."""
    if kind not in KINDS:
        raise UserError(
            f"no kind of file for answers: {kind}",
            where="--format",
            remedy=f"one of {', '.join(k.lstrip('.') for k in KINDS)}",
        )
    found: dict[str, Path] = {}
    for given in images:
        target = folder / f"{Path(given).name}{kind}"
        if target in found.values():
            raise UserError(
                f"two inputs are named {Path(given).name}",
                where=given,
                remedy="give them to two commands with folders of their own",
            )
        found[given] = target
    return found


def _answered(given: str, target: Path) -> bool:
    """Whether the answers are there, and no older than what they answer."""
    if not target.is_file():
        return False
    return not os.path.exists(given) or os.stat(given).st_mtime <= target.stat().st_mtime


def _note(model: Classifier, top: int, coverage: float | None) -> dict[str, Any]:
    """What the answers depend on: everything in the model, its memory's version, the options."""
    files = json.loads((model.folder / artefact.CHECKSUMS).read_text(encoding="utf-8"))["files"]
    memory = model.memory
    return {
        "model": {name: sha for name, (_, sha) in files.items() if name != artefact.CARD},
        "memory": None if memory is None else store.digest(memory.root, memory.version),
        "top": top,
        "coverage": coverage,
    }


def _check_note(folder: Path, note: dict[str, Any]) -> None:
    path = folder / NOTE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        durable.write_text(path, json.dumps(note, indent=1), shared=True)
        return
    except ValueError:
        before = None
    if before != note:
        raise UserError(
            "this folder has answers of another model, another version of its memory, or other "
            "options",
            where=str(folder),
            remedy="name another folder",
        )
