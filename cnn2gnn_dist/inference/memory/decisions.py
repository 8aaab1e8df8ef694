"""The relabel list that a model was trained with (``data.relabel``): an audit of the model adds its decisions to it.

``relabel.csv`` in the memory's folder, with a third column: the image's key in this model, if it has the image.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable
from pathlib import Path

from cnn2gnn_dist import durable

FILE = "relabel.csv"
_COLUMNS = ("key", "class", "image")


def record(root: Path, lines: Iterable[tuple[str, str, str]]) -> None:
    """Write the list: key and class as the list has them, and the key that the image has in this model, or nothing."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerows([_COLUMNS, *lines])
    durable.write_text(root / FILE, text.getvalue())


def listed(root: Path) -> list[tuple[str, str, str]]:
    """The lines as they were given to ``record``; empty without a list."""
    try:
        with open(root / FILE, encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file)
            return [(line["key"], line["class"], line["image"]) for line in lines]
    except FileNotFoundError:
        return []


def forget(root: Path, keys: Collection[str]) -> None:
    """Delete the lines on forgotten images, given by their keys in this model."""
    before = listed(root)
    gone = set(keys)
    if after := [line for line in before if line[2] not in gone]:
        if after != before:
            record(root, after)
    else:
        (root / FILE).unlink(missing_ok=True)
