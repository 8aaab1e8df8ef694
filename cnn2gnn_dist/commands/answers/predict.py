"""``cnn2gnn predict``: classify images with a model, and show what they attach to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

from cnn2gnn_dist.commands.answers.answer_files import company, doubt, set_of, writer_of
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
        write_text = _printer(as_json, "network" if classifier.spec.scope == "none" else "graph")
        given = expand(list(images), left_out=report_error)
        answers: Iterable[Answer]
        if together or same:
            answers = classifier.predict_together(
                list(given), same=same, top=top, neighbours=NEIGHBOURS
            )
            _say_related(answers, _log.info if as_json and out is None else output)
        else:
            answers = classifier.stream(given, top=top, neighbours=NEIGHBOURS, coverage=coverage)
        with writer_of(out) if out is not None else nullcontext(write_text) as write:
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


def _printer(as_json: bool, usual: str) -> Callable[[Answer], None]:
    return lambda answer: output(
        json.dumps(answer.as_dict()) if as_json else as_text(answer, usual)
    )


def _say_related(answers: list[Answer], say: Callable[[str], None]) -> None:
    """Say once whether the images were found, or said, to be related; warn where they alone contradict that."""
    if (line := next(filter(None, map(company, answers)), None)) is not None:
        say(line)
    if (why := next(filter(None, map(doubt, answers)), None)) is not None:
        _log.warning(why)


def as_text(answer: Answer, usual: str = "graph") -> str:
    """An answer as lines of text; its path only if that is not the ``usual`` one of the model."""
    facts = [f"{name} {share:.1%}" for name, share in answer.classes]
    facts += [fact for fact in [set_of(answer)] if fact is not None]
    lines = [f"{answer.name}  {'  '.join(facts)}"]
    if answer.path != usual:
        lines.append(f"    path: {answer.path}")
    lines += [f"    {n.weight:.2f}  {n.label}  {n.key}" for n in answer.neighbours]
    return "\n".join(lines)
