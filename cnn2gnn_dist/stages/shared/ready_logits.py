"""A teacher's precomputed logits: ``targets.logits``, one Parquet file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.index.relabel import names_of
from cnn2gnn_dist.errors import UserError

CLASSES = b"classes"
_SHOWN = 3


def read_logits(path: Path, manifest: Manifest) -> np.ndarray:
    """Log-probabilities [N, C] float32 of the training images, from a file of logits.

    Columns: ``key`` (the sample's key, or shard/key where a key is used twice) or ``id`` (row of the training
    manifest), and ``logits``, a list of C numbers. Rows with another key, or without an id, are ignored. The
    file's metadata may hold ``classes``, a JSON list of the names behind the columns, which are then brought into
    the training images' order; without it the order must be theirs.

    Raises:
        UserError: unreadable; columns, classes or numbers that don't fit; images without logits, or with two.
    """  # noqa: DOC501
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise _wrong(path, f"the logits can't be read: {error}", "one Parquet file") from None
    names = set(table.column_names)
    if "logits" not in names or not names & {"key", "id"}:
        raise _wrong(
            path,
            f"the columns are {', '.join(sorted(names))}",
            "columns key (or id) and logits",
        )
    row_M = _rows(path, table, manifest)
    logits_MC = _numbers(path, table)
    logits_MC = _in_order(path, table, logits_MC, manifest)
    wanted_M = row_M >= 0
    count_N = np.bincount(row_M[wanted_M], minlength=len(manifest))
    for many, what in ((count_N == 0, "have no logits"), (count_N > 1, "have more than one row")):
        if many.any():
            some = ", ".join(manifest.key(int(n)) for n in np.flatnonzero(many)[:_SHOWN])
            raise _wrong(
                path,
                f"{int(many.sum())} of {len(manifest)} training images {what}: {some}",
                "one row for each training image",
            )
    made_NC = np.empty((len(manifest), logits_MC.shape[1]), np.float32)
    made_NC[row_M[wanted_M]] = logits_MC[wanted_M]
    top_N1 = made_NC.max(1, keepdims=True)
    return made_NC - (top_N1 + np.log(np.exp(made_NC - top_N1).sum(1, keepdims=True)))


def _rows(path: Path, table: pa.Table, manifest: Manifest) -> np.ndarray:
    """The training image of each row, -1: another image."""
    if "key" in table.column_names:
        rows = names_of(manifest)
        return np.array([rows.get(str(key), -1) for key in table["key"].to_pylist()], np.int64)
    try:
        ids = table["id"].cast(pa.int64()).fill_null(-1).to_numpy()
    except (pa.ArrowException, ValueError) as error:
        raise _wrong(path, f"the column id holds no integers: {error}", "ids or keys") from None
    most = int(ids.max(initial=-1))
    if most >= len(manifest):
        # Rows of all images, from which held-out ones were taken later: the ids would name other images.
        raise _wrong(
            path,
            f"there are ids up to {most}, but only {len(manifest)} training images",
            "ids that are rows of manifest/train.arrow, without held-out images, or keys",
        )
    return np.maximum(ids, -1)


def _numbers(path: Path, table: pa.Table) -> np.ndarray:
    column = table["logits"].combine_chunks()
    try:
        flat = column.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
        widths = np.unique([len(row) for row in column])
    except (pa.ArrowException, AttributeError, TypeError) as error:
        raise _wrong(
            path, f"the column logits holds no lists of numbers: {error}", "lists"
        ) from None
    if len(widths) != 1 or not np.isfinite(flat).all():
        what = "lists of different lengths" if len(widths) != 1 else "numbers that are not finite"
        raise _wrong(path, f"the column logits holds {what}", "a finite number for each class")
    return flat.reshape(len(column), int(widths[0]))


def _in_order(path: Path, table: pa.Table, logits_MC: np.ndarray, manifest: Manifest) -> np.ndarray:
    """The columns in the order of the training images' classes."""
    classes = list(manifest.classes)
    if logits_MC.shape[1] != len(classes):
        raise _wrong(
            path,
            f"{logits_MC.shape[1]} logits for {len(classes)} classes",
            "one logit for each class of the training images",
        )
    noted = (table.schema.metadata or {}).get(CLASSES)
    if noted is None:
        return logits_MC
    try:
        named = [str(name) for name in json.loads(noted)]
    except (ValueError, TypeError):
        named = []
    if sorted(named) != sorted(classes):
        odd = sorted(set(named) ^ set(classes))[:_SHOWN]
        raise _wrong(
            path,
            f"its classes are not those of the training images: {', '.join(odd) or 'not a list of names'}",
            "metadata classes: a JSON list of the names of the training images' classes",
        )
    if named != classes and len(set(named)) < len(named):
        raise _wrong(
            path,
            "two classes have the same name, and its classes are in another order than the training images'",
            f"columns in this order: {', '.join(classes[:_SHOWN])}, …",
        )
    return logits_MC if named == classes else logits_MC[:, [named.index(name) for name in classes]]


def _wrong(path: Path, what: str, remedy: str) -> UserError:
    return UserError(what, where=f"targets.logits={path}", remedy=remedy)
