"""``cnn2gnn predict``: classify images with a model, and show what they attach to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

from cnn2gnn_dist.commands.answers.answer_files import writer_of
from cnn2gnn_dist.commands.model.opening import opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.answers import Answer
from cnn2gnn_dist.inference.classifier import BATCH
from cnn2gnn_dist.inference.inputs import complaint, expand
from cnn2gnn_dist.log import output, progress, report_error

_log = logging.getLogger(__name__)

NEIGHBOURS = 5
"""Neighbors listed for each image."""


def command(
    model: Path,
    images: Sequence[str],
    *,
    top: int = 3,
    as_json: bool = False,
    out: Path | None = None,
    coverage: float | None = None,
    together: bool = False,
    same: bool = False,
) -> int:
    """Print classes and neighbors of each image; returns 1 if some could not be read.

    Args:
        model: folder of a model or of a finished run; it may have been moved.
        images: files, folders, tar shards, Parquet files.
        top: classes listed for each image.
        as_json: one JSON object per line instead of text.
        out: file to write instead of printing (``answer_files.KINDS``).
        coverage: also give sets of classes with this coverage.
        together: answer all images together.
        same: as ``together``, for images known to be of one class.

    Raises:
        UserError: not a model, a folder without images, ``top`` below 1, a model that is not
            calibrated for what is asked, ``coverage`` of images answered together.
    """
    _check_options(top, coverage, together or same)
    failed = 0
    with opened(model) as classifier:
        if classifier.spec.scope == "batch":
            _log.warning(
                f"graph.scope=batch: up to {BATCH} images are classified together and are "
                "each other's neighbors, so an answer depends on the other images"
            )
        given = expand(list(images), left_out=report_error)
        answers: Iterable[Answer]
        if together or same:
            answers = classifier.predict_together(
                list(given), same=same, top=top, neighbours=NEIGHBOURS
            )
            _say_related(answers)
        else:
            answers = classifier.stream(given, top=top, neighbours=NEIGHBOURS, coverage=coverage)
        with writer_of(out) if out is not None else nullcontext(_printer(as_json)) as write:
            for answer in progress(answers, "predict", unit="image", delay=2):
                if answer.error is not None:
                    report_error(complaint(answer.name, answer.error))
                    failed += 1
                if answer.error is None or out is not None:
                    write(answer)
    if out is not None:
        output(f"answers  {out}")
    return 1 if failed else 0


def _check_options(top: int, coverage: float | None, together: bool) -> None:
    if top < 1:
        raise UserError(f"no classes to show: {top}", where="--top", remedy="use --top 1 or more")
    if coverage is not None and together:
        raise UserError(
            "--coverage is for images answered one by one, not together",
            where="--coverage",
            remedy="leave out --coverage, or --together and --same",
        )


def _printer(as_json: bool) -> Callable[[Answer], None]:
    return lambda answer: output(json.dumps(answer.as_dict()) if as_json else as_text(answer))


def _say_related(answers: list[Answer]) -> None:
    """Log whether the images were found to be related."""
    found = next((a.scores["together"] for a in answers if a.error is None), None)
    if found is None:
        return
    _log.info(
        f"related: {'yes' if found['related'] else 'no'}; {found['classes']} classes among "
        f"{found['images']} images"
        + ("; each answer depends on the other images" if found["related"] else "")
    )


def as_text(answer: Answer) -> str:
    """An answer as lines of text."""
    classes = "  ".join(f"{name} {share:.1%}" for name, share in answer.classes)
    if "set" in answer.scores:
        classes += f"  set: {', '.join(answer.scores['set']) or 'none'}"
    lines = [f"{answer.name}  {classes}"]
    lines += [f"    {n.weight:.2f}  {n.label}  {n.key}" for n in answer.neighbours]
    return "\n".join(lines)
