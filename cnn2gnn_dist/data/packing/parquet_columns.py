"""Columns of Parquet files by type: which can hold images or labels, and what others seem to hold."""

from __future__ import annotations

import base64
import binascii
import difflib
from pathlib import Path
from typing import Any

import pyarrow as pa

from cnn2gnn_dist.data.images.file_kind import ENOUGH, kind_of
from cnn2gnn_dist.data.tar.tar_file import shown
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.log import quoted

IMAGE_COLUMNS = ("image", "img")
"""Usual names of the column of images."""
LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
"""Usual names of the column of labels."""
_LAYOUT = "the layout is struct<bytes: binary, path: string>, or binary, of encoded images"


def is_image(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold encoded images."""
    return _is_binary(kind.field("bytes").type) if _has_bytes(kind) else _is_binary(kind)


def is_label(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold one label per row."""
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_dictionary(kind)
        or is_text(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text."""
    view = getattr(pa.types, "is_string_view", lambda kind: False)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    view = getattr(pa.types, "is_binary_view", lambda kind: False)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or view(kind))


def _has_bytes(kind: Any) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def no_column(path: Path, schema: pa.Schema, column: str, field: str) -> UserError:
    """The error for a column that is missing, with the columns that were probably meant."""
    fits = is_image if field == "image" else is_label
    alike = [name for name in schema.names if name.lower() == column.lower()]
    likely = alike or [each.name for each in schema if fits(each.type)]
    if not likely:
        likely = difflib.get_close_matches(column, schema.names, 1)
    nested = [each.name for each in schema if column.startswith(f"{each.name}.")]
    if nested and pa.types.is_struct(schema.field(nested[0]).type):
        return UserError(
            f"the Parquet file has no column '{column}': it is nested inside the column "
            f"'{nested[0]}'",
            where=str(path),
            remedy="only top-level columns are read: flatten the table first "
            "(pyarrow's Table.flatten(), datasets' flatten())",
        )
    remedy = f"set data.{field}_column=NAME to the column with the {field}s"
    if likely:
        choices = " or ".join(f"data.{field}_column={quoted(name)}" for name in likely[:4])
        remedy = f"did you mean {choices}?"
    return UserError(
        f"the Parquet file has no column '{column}', only: {', '.join(schema.names)}",
        where=str(path),
        remedy=remedy,
    )


def check_images(path: Path, file: Any, column: str) -> None:
    """Check that a column can hold encoded images.

    Raises:
        UserError: it holds something else.
    """
    kind = file.schema_arrow.field(column).type
    if is_image(kind):
        return
    raise UserError(
        f"column '{column}' is {kind}, not encoded images{_hint(file, column, kind)}",
        where=str(path),
        remedy=_LAYOUT,
    )


def _hint(file: Any, column: str, kind: pa.DataType) -> str:
    """Describe what a column of the wrong type seems to contain."""
    if is_text(kind):
        batch = next(file.iter_batches(batch_size=1, columns=[column]), None)
        value = batch.column(0)[0].as_py() if batch is not None and len(batch) else None
        return _hint_text(value or "")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if is_image(kind.value_type):
            return ": it contains several images per row"
        return ": it contains lists of numbers (pixels, or single bytes)"
    if pa.types.is_fixed_size_binary(kind):
        return ": all values have the same length (raw pixels?)"
    return ""


def _hint_text(value: str) -> str:
    if value.startswith("data:image"):
        return ": it contains data: URLs"
    if "://" in value[:12]:
        return f": it contains URLs ('{shown(value, 60)}')"
    try:
        if len(value) > 64 and kind_of(base64.b64decode(value[:400] + "=" * 2)[:ENOUGH]):
            return ": it contains base64 text, which must be decoded first"
    except (binascii.Error, ValueError):
        pass
    return f": it contains text, such as file paths ('{shown(value, 60)}')" if value else ""


def no_labels(path: Path, column: pa.Array, name: str) -> UserError:
    """The error for a column whose type is not that of class labels."""
    kind = column.type
    hint, remedy = "", "number the classes from 0 as integers, or give their names as text"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        hint = " (regression targets, or class numbers as floats?)"
        remedy = "if they are class numbers, save the column as integers"
    elif (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        first: list[Any] = next((row for row in column[:100].to_pylist() if row), [])
        if len(first) > 1 and sum(bool(value) for value in first) == 1:
            hint, remedy = " (one-hot?)", "save the position of the 1 as an integer (argmax)"
        else:
            hint, remedy = (
                " (several labels per row?)",
                "give each row one label, an integer or text",
            )
    elif pa.types.is_null(kind):
        hint, remedy = " (all rows are null)", "name another column: data.label_column=NAME"
    return UserError(
        f"column '{name}' is {kind}, not a column of class labels{hint}",
        where=str(path),
        remedy=remedy,
    )
