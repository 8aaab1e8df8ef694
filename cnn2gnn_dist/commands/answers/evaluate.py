"""``cnn2gnn evaluate --model``: how well a model answers labeled images."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cnn2gnn_dist import durable
from cnn2gnn_dist.commands.model.opening import opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.evaluation import Evaluation, evaluate
from cnn2gnn_dist.inference.inputs import complaint
from cnn2gnn_dist.inference.labelled_inputs import labelled
from cnn2gnn_dist.log import output, progress, report_error

_log = logging.getLogger(__name__)
_CONFUSED = 5  # pairs of classes shown


def command(
    model: Path, images: Sequence[str], *, label_column: str = "label", out: Path | None = None
) -> int:
    """Print a table of accuracies; returns 1 if some images could not be read.

    Args:
        model: folder of a model or of a finished run; it may have been moved.
        images: folders with a folder of images for each class, tar shards, Parquet files, or patterns of these.
        label_column: of Parquet files.
        out: JSON file of all figures, with each class's recall and the confusion matrix.

    Raises:
        UserError: not a model; a pattern without a match; images without a label, or of a class that the model
            doesn't have; the file is not JSON or can't be written.
    """
    if out is not None:
        if out.suffix.lower() != ".json":
            raise UserError(
                "the figures are written as JSON", where=f"--out {out}", remedy="FILE.json"
            )
        durable.check_writable(out)
    with opened(model) as classifier:
        given = labelled(matching(images), classifier.classes_, label_column)
        found = evaluate(classifier, progress(given, "evaluate", unit="image", delay=2))
    for name, why in found.unreadable:
        report_error(complaint(name, why))
    if found.in_memory:
        _log.warning(
            f"{found.in_memory:,} of {found.images:,} images are, or nearly are, images of the memory: if "
            "they were trained on, the figures are too high"
        )
    output(table(found))
    if out is not None:
        durable.write_text(out, json.dumps(found.as_dict(), indent=1))
        output(f"figures  {out}")
    return 1 if found.unreadable else 0


def matching(images: Sequence[str]) -> list[str]:
    """The files that are named, or match a pattern: quoted ones, and those without a match, a shell leaves as they are.

    Raises:
        UserError: nothing matches a pattern.
    """
    found: list[str] = []
    for given in images:
        if os.path.lexists(given) or not glob.has_magic(given):  # a name may hold brackets
            found.append(given)
        elif matches := sorted(glob.glob(given)):
            found += matches
        else:
            raise UserError(
                "nothing matches this pattern",
                where=given,
                remedy=f"check it (relative paths start at the current folder, {os.getcwd()})",
            )
    return found


def table(found: Evaluation) -> str:
    """The figures as text."""
    lines = ["{:<12}{:>18}{:>10}{:>8}{:>9}".format("", "accuracy", "balanced", "ECE", "top 5")]
    for name, row in found.rows.items():
        accuracy = f"{row['accuracy']:.2%} ± {100 * row['standard_error']:.2f}"
        lines.append(
            f"{name:<12}{accuracy:>18}{row['balanced_accuracy']:>10.2%}{row['ece']:>8.3f}{row['top5']:>9.2%}"
        )
    count = sum(share is not None for share in found.recall().values())
    lines.append(f"{found.images:,} images of {count} classes (±: standard error)")
    lines += [
        f"  {true} answered as {said}: {images:,}"
        for true, said, images in found.confused(_CONFUSED)
    ]
    return "\n".join(lines)
