"""The folder that an audit writes, and what a model's own one (``MODEL/audit``) must not keep of forgotten images."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from pathlib import Path

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.index.relabel import DROP_IF_THERE

PAGE, RELABEL, MAP = "index.html", "relabel.csv", "map.parquet"
TABLES = ("labels", "duplicates", "outliers", "hubs", "bleeding")
_SAVED = "labels.csv"
"""What the page saves, if a person has put it here; the table of this name has a column ``suggested``."""


def forget(folder: Path, keys: Collection[str]) -> bool:
    """Delete what an audit has written of all images; in lists of decisions, forgotten images are then left out.

    Pictures of forgotten images are also shown as the neighbors of others.

    Args:
        folder: of the audit; it may be missing.
        keys: of the forgotten images.

    Returns:
        Whether anything was deleted.

    Raises:
        OSError: a file can't be read, written or deleted.
        ValueError: a list of decisions is not a CSV file in UTF-8.
    """
    made = [PAGE, MAP, *(f"{name}.{kind}" for name in TABLES for kind in ("parquet", "csv"))]
    made += [f"{name}.tmp" for name in (*made, RELABEL)]  # of an audit that was killed
    found = [folder / name for name in made]
    found = [path for path in found if path.is_file() and not _is_decisions(path)]
    for path in found:
        path.unlink()
    for path in (folder / RELABEL, folder / _SAVED):
        if path.is_file():
            _leave_out(path, set(keys))
    if found and not any(folder.iterdir()):
        folder.rmdir()
    return bool(found)


def _is_decisions(path: Path) -> bool:
    return path.name == _SAVED and "suggested" not in _lines(path)[0]


def _lines(path: Path) -> list[list[str]]:
    """The fields of all lines, with the names of the columns first."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            return list(csv.reader(file)) or [[]]
        except csv.Error as error:
            raise ValueError(f"{path.name}: {error}") from None


def _leave_out(path: Path, keys: set[str]) -> None:
    columns, *lines = _lines(path)
    if not {"key", "class"} <= set(columns):
        return  # no list of decisions
    at = columns.index("key")
    kept = [line for line in lines if line and not keys.intersection(line[at : at + 1])]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *kept])
    forgotten = csv.DictWriter(text, columns, lineterminator="\n")
    forgotten.writerows({"key": key, "class": DROP_IF_THERE} for key in sorted(keys))
    durable.write_text(path, text.getvalue())
