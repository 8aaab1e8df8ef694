"""``cnn2gnn memory``: look at a model's memory, and edit it."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from cnn2gnn_dist import ledger
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier, load
from cnn2gnn_dist.inference.editing import Added
from cnn2gnn_dist.inference.inputs import complaint, expand
from cnn2gnn_dist.inference.memory import edits
from cnn2gnn_dist.inference.memory.set_apart import SetApart
from cnn2gnn_dist.inference.memory.store import Version
from cnn2gnn_dist.inference.memory.view import forgotten
from cnn2gnn_dist.log import counted, output, quoted, report_error

_log = logging.getLogger(__name__)
NAMED = 5
"""Most keys named in a line."""
_NORMAL_95 = 1.959964
"""Standard deviations around its mean that hold 95 % of a normal distribution."""
_ROW = re.compile(r"(.*/)?train-\d{8}")
"""Keys that the packers of Parquet files and of CIFAR make."""


def add(
    folder: Path, images: Sequence[str], class_name: str, *, old_loss: float | None, dry_run: bool
) -> int:
    """Add images of one class; first print what it costs and brings. Returns 1 if some can't be read.

    Raises:
        UserError: see ``editing.add``.
    """
    model = load(folder)

    def tell(planned: Added) -> None:
        for name, why in planned.errors:
            report_error(complaint(name, why))
        kind = "a new class" if planned.new_class else "a trained class"
        verb = "would add" if dry_run else "adding"
        output(f"{verb} {counted(len(planned.keys), 'image')} of '{planned.class_name}', {kind}")
        if planned.new_class:
            output(trade_table(planned))

    given = expand(list(images), left_out=report_error)
    done = editing.add(model, given, class_name, old_loss=old_loss, dry_run=dry_run, tell=tell)
    if done.version is not None:
        _print_version(done.version, model)
    return 1 if done.errors else 0


def trade_table(done: Added) -> str:
    """The predicted accuracies for a range of losses, the chosen row marked.

    Those of new classes with a 95 % interval: a few images say little about others.
    """
    how = "its column is learned" if done.learned else "it is scored by the mean of its images"
    lines = [
        f"{how}; predicted accuracy, old classes {done.old_before:.1f} % before:",
        "  may lose   old classes   new classes (95 % interval)",
    ]
    for trade in done.trades:
        new = "   ?"
        if trade.new is not None:
            low, high = wilson(trade.new / 100, done.judged_on)
            new = f"{trade.new:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
        mark = "  <- this one (--old-loss)" if trade.old_loss == done.old_loss else ""
        lines.append(f"  {trade.old_loss:8g}   {trade.old:9.1f} %   {new:>20}{mark}")
    return "\n".join(lines)


def wilson(share: float, images: float) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share of so many (> 0) images; it is right for few, too."""
    width = _NORMAL_95**2 / images
    middle = (share + width / 2) / (1 + width)
    half = (share * (1 - share) * width + width**2 / 4) ** 0.5 / (1 + width)
    return max(0.0, middle - half), min(1.0, middle + half)


def remove(folder: Path, keys: Sequence[str]) -> int:
    """Remove images by their keys.

    Raises:
        UserError: an unknown key; nothing was changed.
    """
    model = load(folder)
    _print_version(editing.remove(model, list(keys)), model)
    return 0


def relabel(folder: Path, keys: Sequence[str], class_name: str) -> int:
    """Give images another class.

    Raises:
        UserError: an unknown key or class; nothing was changed.
    """
    model = load(folder)
    _print_version(editing.relabel(model, list(keys), class_name), model)
    return 0


def forget(folder: Path, keys: Sequence[str]) -> int:
    """Remove images and everything stored about them; print what that can't undo.

    Raises:
        UserError: an unknown key; nothing was changed.
    """
    model = load(folder)
    apart = SetApart(model.folder).keys().intersection(keys)
    memory = model.required_memory()
    added = set(memory.keys(np.flatnonzero(memory.added))).intersection(keys)
    _print_version(editing.forget(model, list(keys)), model)
    if apart:
        output(
            f"{len(apart)} of them were set apart for calibration: their outputs are deleted; what was fitted on them "
            "(calibration.json) stays as it is, until the model is exported anew from a training without them"
        )
    listed = forgotten(memory.root)
    output(
        f"{counted(len(listed), 'key')} {'is' if len(listed) == 1 else 'are'} in {memory.root / 'forgotten.csv'}: "
        "train with a copy of this list as data.relabel to leave these images out"
    )
    for line in _not_left_out(keys, added):
        output(line)
    output(
        "not undone: the network's weights and the teacher's soft targets were learned from them too; "
        "only training again without them removes that"
    )
    return 0


def _not_left_out(keys: Sequence[str], added: Collection[str]) -> Iterator[str]:
    """Which images a later training with the list has all the same, and why; ``added``: keys of added images."""
    if added:
        some = ", ".join(sorted(added)[:NAMED]) + (", …" if len(added) > NAMED else "")
        yield (
            f"except {len(added)} that were added to the memory: their keys are names of files, not keys of training "
            f"images, so keep these files out of the training images yourself: {some}"
        )
    numbered = sorted(key for key in set(keys).difference(added) if _ROW.fullmatch(key))
    if numbered:
        yield (
            f"keys like {numbered[0]} are row numbers, if the training images came from Parquet files or CIFAR: the "
            "list fits these files as they are; once rows are removed from them, it would leave out other images"
        )


def undo(folder: Path) -> int:
    """Return to the version before the current one.

    Raises:
        UserError: there is none.
    """
    model = load(folder)
    _print_version(editing.undo(model), model)
    return 0


def compact(folder: Path) -> int:
    """Delete earlier versions and removed images.

    Raises:
        UserError: the disk is full; nothing was changed.
    """
    model = load(folder)
    _print_version(editing.compact(model), model)
    return 0


def show(folder: Path, *, keys: bool, class_name: str | None) -> int:
    """Print the classes with their numbers of images, or the keys of the images.

    Raises:
        UserError: no memory; an unknown class.
    """
    memory = load(folder).required_memory()
    if class_name is not None:
        given, class_name = class_name, memory.class_named(class_name)
        if class_name is None:
            raise UserError(
                f"the memory has no class '{given}'",
                where=str(folder),
                remedy=f"one of {', '.join(memory.classes[:10])}",
            )
    if not keys:
        output(f"{counted(len(memory), 'image')}, version {memory.version.number}")
        for label, (name, count) in enumerate(zip(memory.classes, memory.counts(), strict=True)):
            if class_name in (None, name):
                output(f"{count:8,}  {name}{'' if label < memory.trained else '  (new)'}")
        return 0
    ids = memory.live_ids
    if class_name is not None:
        ids = ids[memory.of_class(class_name)[ids]]
    for key, label in zip(memory.keys(ids), memory.labels[ids].tolist(), strict=True):
        output(f"{key}\t{memory.classes[label]}")
    return 0


def log(folder: Path) -> int:
    """Print the versions, newest first.

    Raises:
        UserError: no memory.
    """
    for version in edits.history(load(folder).required_memory().root):
        output(f"{version.number:5}  {version.made}  {version.rows:8,} rows  {version.action}")
    return 0


def keys_from(file: Path) -> list[str]:
    """Keys from a text file: one per line, as ``ls --keys`` prints them, or a CSV's column ``key``.

    Raises:
        UserError: it can't be read.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            text = opened.read()
        head = next(csv.reader(io.StringIO(text)), [])
        if "key" in head:
            lines = csv.reader(io.StringIO(text), strict=True)
            at = next(lines).index("key")
            return [line[at] for line in lines if line[at:] and line[at].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"this list of keys can't be read: {error}",
            where=str(file),
            remedy="a text file with one key per line, or a CSV file with a column `key`",
        ) from None
    # Not a CSV: a key may hold commas and quotes. After a tab `ls --keys` prints the class.
    lines_of_text = (line.rstrip("\r").partition("\t")[0] for line in text.split("\n"))
    return [key for key in lines_of_text if key.strip()]


def _print_version(version: Version, model: Classifier) -> None:
    memory = model.required_memory()
    output(f"version {version.number}: {version.action}; {counted(len(memory), 'image')}")
    counts = memory.counts()
    for name, count in zip(memory.classes, counts, strict=True):
        if not count:
            output(f"note: the class '{name}' has no images left in the memory")
    if ledger.held(model.folder):
        _log.warning(
            "the storage of this run (run.storage) keeps the model without this edit, and gets none: if this folder is "
            f"lost, so is the edit. To keep edits, `cnn2gnn export {quoted(model.folder)} --to MODEL`, and edit MODEL"
        )
