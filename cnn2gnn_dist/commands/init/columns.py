"""Which columns of a Parquet file hold the images and the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.data.images.image_files import printable
from cnn2gnn_dist.data.packing.parquet import (
    Labels,
    huggingface_names,
    open_parquet,
    read_labels,
)
from cnn2gnn_dist.data.packing.parquet_columns import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    is_image,
    is_label,
    no_column,
)
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.inputs import image_column


def find_columns(path: Path, label_column: str | None) -> tuple[tuple[str, str], bool]:
    """The columns of images and labels: by their usual names, else the only ones of the type.

    Returns:
        Their names, and whether nothing but its type says that the second one holds the classes.

    Raises:
        UserError: there is no such column; several columns could be the images or the classes, and none has a usual
            name; the file can't be read.
    """  # noqa: DOC501
    with open_parquet(path) as file:
        schema = file.schema_arrow
    labels = [each.name for each in schema if is_label(each.type)]
    if label_column is not None and label_column not in schema.names:
        raise _for_option(no_column(path, schema, label_column, "label"))
    image = _image_column(path, schema)
    label = label_column or next((name for name in LABEL_COLUMNS if name in labels), None)
    if label is not None:
        return (image, label), False
    if len(labels) == 1:
        return (image, labels[0]), not huggingface_names(path, schema.metadata, labels[0])
    if labels:
        raise UserError(
            f"no column is named {' or '.join(LABEL_COLUMNS)}, and {len(labels)} have a type that labels have: "
            f"{_listed(labels)}",
            where=str(path),
            remedy="name the one with the classes: --label-column NAME",
        )
    if (usual := next((name for name in LABEL_COLUMNS if name in schema.names), None)) is not None:
        return (image, usual), False  # what it holds is said when it is read
    raise UserError(
        f"no column of the Parquet file is of integers or text, as labels are: {_listed(schema.names)}",
        where=str(path),
        remedy="add a column `label` with the class of each image, as an integer or text",
    )


def _image_column(path: Path, schema: Any) -> str:
    usual = [each for name in IMAGE_COLUMNS for each in schema if each.name == name]
    fitting = next((each.name for each in usual if is_image(each.type)), None)
    if fitting is not None:
        return str(fitting)
    if usual and not any(is_image(each.type) for each in schema):
        return str(usual[0].name)  # what it holds is said when it is read
    return image_column(schema, str(path))


def _listed(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:8]) + (", …" if len(names) > 8 else "")


def check_columns(paths: list[Path], columns: tuple[str, str], first: Path) -> None:
    """Check that all files have the columns that were found in the first one.

    Raises:
        UserError: one has not, or can't be read.
    """
    for path in paths:
        with open_parquet(path) as file:
            names = file.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            raise UserError(
                f"the Parquet file has no column '{printable(missing[0])}', which {printable(first.name)} has, only: "
                f"{_listed(names)}",
                where=str(path),
                remedy="give the column the same name in all files",
            )


def labels_in(paths: list[Path], columns: tuple[str, str]) -> Labels:
    """The labels of files.

    Raises:
        UserError: as ``read_labels``, whose remedies are for a config: here the column is an option.
    """  # noqa: DOC501
    try:
        return read_labels(paths, *columns)
    except UserError as error:
        raise _for_option(error) from None


def _for_option(error: UserError) -> UserError:
    remedy = error.remedy.replace("data.label_column=", "--label-column ")
    return UserError(error.what, where=error.where, remedy=remedy)


def guessed_labels(paths: list[Path], columns: tuple[str, str]) -> Labels:
    """The labels in a column that only its type speaks for.

    Raises:
        UserError: its values are not those of classes.
    """
    column = f"column '{printable(columns[1])}', the only one of a type that labels have,"
    where, remedy = (
        str(paths[0]),
        f"--label-column NAME names the column of the classes ({printable(columns[1])}, if it does hold them)",
    )
    try:
        labels = read_labels(paths, *columns)
    except UserError as error:
        raise UserError(
            f"{column} does not look like the classes: {error.what}",
            where=error.where,
            remedy=remedy,
        ) from None
    count_C = np.bincount(np.concatenate(labels.files), minlength=len(labels.classes))
    filled = np.flatnonzero(count_C)
    if count_C.max() == 1:
        raise UserError(
            f"{column} does not look like the classes: no two of its {len(filled):,} values are equal",
            where=where,
            remedy=remedy,
        )
    if len(filled) < len(count_C):
        some = ", ".join(str(value) for value in filled[:4])
        raise UserError(
            f"{column} does not look like the classes, which are numbered from 0 without gaps: its values are "
            f"{some}{', …' if len(filled) > 4 else ''}",
            where=where,
            remedy=remedy,
        )
    return labels
