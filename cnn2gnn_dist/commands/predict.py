"""``cnn2gnn predict``: classify images with a model, and show what they attach to."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from cnn2gnn_dist.commands.opening import opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.answers import Answer
from cnn2gnn_dist.inference.classifier import BATCH
from cnn2gnn_dist.inference.inputs import expand
from cnn2gnn_dist.log import output, progress, report_error

_log = logging.getLogger(__name__)

NEIGHBOURS = 5
"""Neighbors listed for each image."""


def command(model: Path, images: Sequence[str], *, top: int, as_json: bool) -> int:
    """Print classes and neighbors of each image; returns 1 if some could not be read.

    Args:
        model: folder of a model or of a finished run; it may have been moved.
        images: files, folders, tar shards, Parquet files.
        top: classes listed for each image.
        as_json: one JSON object per line instead of text.

    Raises:
        UserError: not a model, a folder without images, ``top`` below 1.
    """
    if top < 1:
        raise UserError(f"no classes to show: {top}", where="--top", remedy="use --top 1 or more")
    failed = 0
    with opened(model) as classifier:
        if classifier.spec.scope == "batch":
            _log.warning(
                f"graph.scope=batch: up to {BATCH} images are classified together and are "
                "each other's neighbours, so an answer depends on its company"
            )
        given = expand(list(images), left_out=report_error)
        answers = classifier.stream(given, top=top, neighbours=NEIGHBOURS)
        for answer in progress(answers, "predict", unit="image", delay=2):
            if answer.error is not None:
                report_error(f"{answer.name}: not readable as an image: {answer.error}")
                failed += 1
            else:
                output(json.dumps(answer.as_dict()) if as_json else as_text(answer))
    return 1 if failed else 0


def as_text(answer: Answer) -> str:
    """An answer as lines of text."""
    classes = "  ".join(f"{name} {share:.1%}" for name, share in answer.classes)
    lines = [f"{answer.name}  {classes}"]
    lines += [f"    {n.weight:.2f}  {n.label}  {n.key}" for n in answer.neighbours]
    return "\n".join(lines)
