"""Hugging Face's image layout in Parquet: columns, labels and class names, validated before packing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cnn2gnn_dist.data.images.file_kind import ENOUGH, kind_of, remedy_for
from cnn2gnn_dist.data.index.class_matching import check_count
from cnn2gnn_dist.data.packing.parquet_columns import (
    check_images,
    is_text,
    no_column,
    no_labels,
)
from cnn2gnn_dist.data.tar.tar_file import shown
from cnn2gnn_dist.errors import UserError, first_line


@dataclass(frozen=True)
class Labels:
    """The labels of Parquet files, in one numbering.

    Attributes:
        files: int64 [rows] of each file, within the classes.
        classes: the class names; None for each class if the files only number them.
    """

    files: list[np.ndarray]
    classes: list[str] | list[None]


@dataclass(frozen=True)
class _Column:
    """The labels of one file: numbers [rows] (-1: none) and their names, if any."""

    path: Path
    label_N: np.ndarray
    names: list[str] | None
    text: bool


def open_parquet(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        UserError: it is missing, corrupt or of another kind.
    """  # noqa: DOC501
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as failure:
        raise _unreadable(path, failure) from failure


def read_column(
    path: Path, column: str, batch: int = 256, row_groups: Sequence[int] | None = None
) -> Iterator[list[Any]]:
    """Yield the values of a column, ``batch`` rows at a time; of some row groups, or of all.

    Raises:
        UserError: the file is missing, corrupt or of another kind.
    """  # noqa: DOC501
    with open_parquet(path) as file:
        batches = file.iter_batches(batch, row_groups=row_groups, columns=[column])
        while True:
            try:
                found = next(batches, None)
                values = None if found is None else found.column(0).to_pylist()
            except (OSError, pa.ArrowException, UnicodeDecodeError) as failure:
                raise _unreadable(path, failure) from failure
            if values is None:
                return
            yield values


def _unreadable(path: Path, failure: Exception) -> UserError:
    try:
        with open(path, "rb") as file:
            start = file.read(ENOUGH)
    except OSError as error:
        return UserError(
            f"the Parquet file cannot be read: {error.strerror}",
            where=str(path),
            remedy="check the path and its permissions",
        )
    kind = kind_of(start)
    if not start:
        what = "the Parquet file is empty (0 bytes)"
        return UserError(what, where=str(path), remedy="download it again")
    if kind == "a Parquet file":
        return UserError(
            f"the Parquet file cannot be read: it is truncated or corrupt ({_reason(failure)})",
            where=str(path),
            remedy="download it again",
        )
    if kind == "text":
        begin = shown(start.decode("utf-8", "replace").strip(), 40)
        return UserError(
            f"the file cannot be read as Parquet: it is text (CSV?): '{begin}'",
            where=str(path),
            remedy="save the data set as Parquet with the images embedded, or read the images "
            "from folders, one per class: data.source=imagefolder",
        )
    if kind is not None:
        return UserError(
            f"the file cannot be read as Parquet: it is {kind}",
            where=str(path),
            remedy=remedy_for(kind, "name Parquet files"),
        )
    return UserError(
        f"the Parquet file cannot be read: {_reason(failure)}",
        where=str(path),
        remedy="check the path; download the file again if it is damaged",
    )


def _reason(failure: Exception) -> str:
    return first_line(failure).rstrip(".")


def read_labels(
    paths: Sequence[Path], image_column: str, label_column: str, unlabelled: bool = False
) -> Labels:
    """Read the labels of files that are packed together; -1: none, where ``unlabelled`` allows it.

    If the files name their classes (Hugging Face's ClassLabel, or text labels), the names are
    decisive: a file that numbers the same classes in a different order is renumbered.

    Raises:
        UserError: a column is missing or does not contain images or labels; files name different
            classes, or only some of them name any; a label is missing or not one of the classes.
    """
    columns = [_read(path, image_column, label_column) for path in paths]
    if not sum(len(column.label_N) for column in columns):
        raise UserError(
            "there are no rows to pack",
            where=", ".join(str(path) for path in paths[:3]),
            remedy="name at least one Parquet file with rows",
        )
    _refuse_missing(columns, unlabelled)
    if any(column.text for column in columns):
        return _of_text(columns)
    return _of_numbers(columns)


def _read(path: Path, image_column: str, label_column: str) -> _Column:
    with open_parquet(path) as file:
        schema = file.schema_arrow
        for column, field in ((image_column, "image"), (label_column, "label")):
            if column not in schema.names:
                raise no_column(path, schema, column, field)
            if schema.names.count(column) > 1:
                what = f"the Parquet file has {schema.names.count(column)} columns named '{column}'"
                raise UserError(what, where=str(path), remedy="rename or drop all but one of them")
        check_images(path, file, image_column)
        names = huggingface_names(path, schema.metadata, label_column)
        try:
            column = file.read([label_column]).column(label_column).combine_chunks()
        except (OSError, pa.ArrowException) as failure:
            raise _unreadable(path, failure) from failure
    if isinstance(column, pa.ChunkedArray):  # pyarrow returns one if there are no rows
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        coded = column.cast(pa.large_string()).dictionary_encode()
        label_N = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        texts = coded.dictionary.to_pylist()
        _refuse_blank(path, label_N, texts)
        return _Column(path, label_N, texts, True)
    return _Column(path, _numbers(path, column, label_column), names, False)


def _refuse_blank(path: Path, label_N: np.ndarray, names: Sequence[str]) -> None:
    """Refuse a class named '': tables converted from CSV have it where a label is missing."""
    blank = [number for number, name in enumerate(names) if not name.strip()]
    wrong = np.flatnonzero(np.isin(label_N, blank))
    if len(wrong):
        raise UserError(
            f"row {wrong[0]} has the label '{shown(names[label_N[wrong[0]]], 40)}', which is not "
            f"a class name; {len(wrong)} of {len(label_N)} rows have an empty or blank label",
            where=str(path),
            remedy="label them, or drop these rows",
        )


def _numbers(path: Path, column: pa.Array, name: str) -> np.ndarray:
    """Return class numbers as int64, -1 where null."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif not pa.types.is_integer(kind):
        raise no_labels(path, column, name)
    highest = pc.max(column).as_py()
    if highest is not None:
        check_count(int(highest) + 1, len(column), str(path))  # before the cast to int64
    label_N: np.ndarray = column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return label_N


def _of_text(columns: list[_Column]) -> Labels:
    """Number text labels: the classes are the sorted distinct names."""
    bare = next((column for column in columns if column.names is None), None)
    if bare is not None:
        raise UserError(
            "some files have class names as labels, but this one has numbers without names",
            where=str(bare.path),
            remedy="use the same kind of label in all files of a split",
        )
    used = [
        {(column.names or [])[n] for n in np.unique(column.label_N).tolist() if n >= 0}
        if column.text
        else set(column.names or [])
        for column in columns
    ]
    classes = sorted(set().union(*used))
    number = {name: label for label, name in enumerate(classes)}
    return Labels([_renumbered(column, number) for column in columns], classes)


def _of_numbers(columns: list[_Column]) -> Labels:
    first = columns[0]
    for column in columns[1:]:
        if column.names == first.names:
            continue
        if column.names is None or first.names is None:
            bare, named = (column, first) if column.names is None else (first, column)
            raise UserError(
                f"the file only numbers its classes, but {named.path} names them",
                where=str(bare.path),
                remedy="pack files of one data set at a time",
            )
        if sorted(column.names) != sorted(first.names) or len(set(first.names)) < len(first.names):
            raise UserError(
                f"the class names differ from those of {first.path}: "
                f"{_difference(column.names, first.names)}",
                where=str(column.path),
                remedy="pack files of one data set at a time",
            )
    if first.names is None:
        highest = max(int(column.label_N.max(initial=0)) for column in columns)
        return Labels([column.label_N for column in columns], [None] * (highest + 1))
    number = {name: label for label, name in enumerate(first.names)}
    return Labels(
        [
            column.label_N if column.names == first.names else _renumbered(column, number)
            for column in columns
        ],
        first.names,
    )


def _difference(names: list[str], others: list[str]) -> str:
    more, less = sorted(set(names) - set(others)), sorted(set(others) - set(names))
    said = []
    for these, verb in ((more, "it has"), (less, "it is missing")):
        if these:
            listed = ", ".join(f"'{shown(name, 40)}'" for name in these[:3])
            said.append(f"{verb} {listed}{', …' if len(these) > 3 else ''}")
    return " and ".join(said) or "the same names in a different order, some of them twice"


def _renumbered(column: _Column, number: dict[str, int]) -> np.ndarray:
    to = np.array([*(number.get(name, -1) for name in column.names or []), -1], np.int64)
    return to[column.label_N]  # -1, none, is the last


def _refuse_missing(columns: list[_Column], unlabelled: bool) -> None:
    """Check that every row has a label (or none, if ``unlabelled``), which its file names, if it names any."""
    for column in columns:
        count = np.iinfo(np.int64).max if column.names is None else len(column.names)
        least = -1 if unlabelled else 0
        wrong = np.flatnonzero((column.label_N < least) | (column.label_N >= count))
        if not len(wrong):
            continue
        row = int(wrong[0])
        label = int(column.label_N[row])
        if label >= 0:
            raise UserError(
                f"row {row} has the label {label}; there are {count} classes, numbered from 0",
                where=str(column.path),
                remedy="correct the label, or the class names in the file's metadata",
            )
        raise UserError(
            f"row {row} has no label (null, or label -1), like {len(wrong)} of "
            f"{len(column.label_N)} rows",
            where=str(column.path),
            remedy="Hugging Face uses label -1 for hidden labels: pack a split with labels, drop the "
            "rows without one, or, for training images, data.unlabelled=true",
        )


def huggingface_names(
    path: Path, metadata: dict[bytes, bytes] | None, label_column: str
) -> list[str] | None:
    """Return ClassLabel's names by number; None if the metadata have none: the classes are only numbered."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
        if isinstance(names, dict):  # some dataset cards use {"0": "cat", …}
            names = {int(number): name for number, name in names.items()}
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            # By position, label 1 would get the name of 2.
            listed = ", ".join(map(str, sorted(names)[:5])) + (", …" if len(names) > 5 else "")
            raise UserError(
                f"the file's metadata name the classes {listed}, which are not 0 to {len(names) - 1}",
                where=str(path),
                remedy="number classes and labels from 0 without gaps, or remove the names "
                "(pyarrow's replace_schema_metadata)",
            )
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        return None
    if None in names:
        raise UserError(
            f"the file's metadata have no name for class {names.index(None)}, but for others",
            where=str(path),
            remedy="name all classes, or remove the names (pyarrow's replace_schema_metadata)",
        )
    return [str(name) for name in names]
