"""Hugging Face's image layout in Parquet: the labels and class names, checked before packing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnn2gnn_dist.errors import UserError


def open_parquet(path: Path) -> Any:
    """Open a Parquet file; UserError if it is missing or damaged."""
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as failure:
        raise UserError(
            f"The Parquet file cannot be read: {str(failure).splitlines()[0]}",
            where=str(path),
            remedy="Check the path; download the file again if it is damaged.",
        ) from failure


def read_labels(path: Path, image_column: str, label_column: str) -> np.ndarray:
    """Return the labels, int64 [rows], -1 where null; UserError if the columns are not fit."""
    with open_parquet(path) as file:
        schema = file.schema_arrow
        for column in (image_column, label_column):
            if column not in schema.names:
                raise UserError(
                    f"The Parquet file has no column '{column}', only: {', '.join(schema.names)}.",
                    where=str(path),
                    remedy="Say which columns hold the images and labels "
                    "(image_column, label_column).",
                )
        kind = schema.field(image_column).type
        inner = kind.field("bytes").type if _has_bytes(kind) else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise UserError(
                f"Column '{image_column}' is {kind}, not encoded images.",
                where=str(path),
                remedy="The layout is struct<bytes: binary, path: string>, or binary.",
            )
        column = file.read([label_column]).column(label_column)
    if not pa.types.is_integer(column.type):
        raise UserError(
            f"Column '{label_column}' is {column.type}, not the number of a class.",
            where=str(path),
            remedy="Number the classes from 0.",
        )
    label_N: np.ndarray = column.fill_null(-1).to_numpy().astype(np.int64)
    return label_N


def _has_bytes(kind: Any) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def read_classes(paths: Sequence[Path], label_column: str, highest: int) -> list[str]:
    """Return the class names all files agree on; without any, the numbers up to ``highest``."""
    found: list[str] | None = None
    for number, path in enumerate(paths):
        with open_parquet(path) as file:
            names = _huggingface_names(file.schema_arrow.metadata, label_column)
        if number and names != found:
            raise UserError(
                f"The class names differ from those of {paths[0]}.",
                where=str(path),
                remedy="Pack files of one data set at a time.",
            )
        found = names
    return found or [str(label) for label in range(highest + 1)]


def _huggingface_names(metadata: dict[bytes, bytes] | None, label_column: str) -> list[str] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, TypeError, ValueError):  # no names: the classes go by number
        return None
    if isinstance(names, dict):  # some cards keep {"0": "cat", …}
        names = [names[number] for number in sorted(names, key=int)]
    return [str(name) for name in names]
