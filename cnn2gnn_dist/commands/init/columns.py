"""Which columns of a Parquet file hold the images and the classes."""

from __future__ import annotations

from pathlib import Path

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
)
from cnn2gnn_dist.errors import UserError


def find_columns(path: Path, label_column: str | None) -> tuple[tuple[str, str], bool]:
    """The columns of images and labels: by their usual names, else the only ones of the type.

    Returns:
        Their names, and whether nothing but its type says that the second one holds the classes.

    Raises:
        UserError: several columns could be the classes, and none has a usual name; the file can't be read.
    """
    with open_parquet(path) as file:
        schema = file.schema_arrow
    images = [each.name for each in schema if is_image(each.type)]
    labels = [each.name for each in schema if is_label(each.type)]
    image = next((name for name in IMAGE_COLUMNS if name in images), None)
    if image is None:
        image = images[0] if len(images) == 1 else IMAGE_COLUMNS[0]
    label = label_column or next((name for name in LABEL_COLUMNS if name in labels), None)
    if label is not None:
        return (image, label), False
    if len(labels) == 1:
        return (image, labels[0]), not huggingface_names(path, schema.metadata, labels[0])
    if labels:
        raise UserError(
            f"no column is named {' or '.join(LABEL_COLUMNS)}, and {len(labels)} have a type that labels have: "
            f"{', '.join(printable(name) for name in labels[:8])}",
            where=str(path),
            remedy="name the one with the classes: --label-column NAME",
        )
    return (image, LABEL_COLUMNS[0]), False


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
