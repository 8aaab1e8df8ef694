"""A manifest on disk: one uncompressed Arrow IPC record batch, with shards and classes as JSON metadata.

It is memory-mapped: 1.28 million rows take 54 MB and open in 10 ms.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.index.shard_rows import COLUMNS
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import UserError

VERSION = 1
_METADATA = b"cnn2gnn.manifest"
_KINDS = {**COLUMNS, "crc": np.uint32}
_OPTIONAL = {"crc"}

Made = TypeVar("Made")


@dataclass(frozen=True)
class Shard:
    """A tar file: its path (absolute once loaded), its length in bytes, and its number of samples."""

    path: str
    bytes: int
    samples: int


@dataclass(frozen=True)
class ManifestInfo:
    """The metadata of a manifest."""

    digest: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]


def write(
    path: Path, info: ManifestInfo, columns: Mapping[str, np.ndarray], keys: pa.Array
) -> None:
    """Write a manifest by atomic rename."""
    target = path.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "version": VERSION,
        "digest": info.digest,
        "classes": info.classes,
        "shards": [
            {**dataclasses.asdict(s), "path": _recorded(s.path, target.parent)} for s in info.shards
        ],
    }
    arrays = {name: _as_arrow(column, _KINDS[name]) for name, column in columns.items()}
    arrays["key"] = keys
    schema = pa.schema(
        [(name, array.type) for name, array in arrays.items()],
        metadata={_METADATA: json.dumps(header).encode()},
    )
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), schema=schema)
    with (
        durable.replacing(target, shared=True) as temporary,
        open(temporary, "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        writer.write_batch(batch)


def read(path: Path, make: Callable[[ManifestInfo, dict[str, np.ndarray], pa.Array], Made]) -> Made:
    """Memory-map a manifest and build it with ``make``, whose ValueError means a corrupt file.

    Raises:
        UserError: the file is missing, corrupt, or not a manifest of this version.
    """  # noqa: DOC501 (the ValueError becomes a UserError)
    source = path.absolute()
    try:
        # There is one batch; the mapping stays open as long as the arrays that view it.
        batch = pa.ipc.open_file(pa.memory_map(str(source))).get_batch(0)
        header = json.loads(batch.schema.metadata[_METADATA])
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']}, expected {VERSION}")
        columns = {
            name: _as_numpy(batch.column(name), kind)
            for name, kind in _KINDS.items()
            if name not in _OPTIONAL or name in batch.schema.names
        }
        return make(_info(header, source.parent), columns, batch.column("key"))
    except FileNotFoundError as failure:
        raise UserError(
            "there is no manifest here", where=str(source), remedy="index the shards first"
        ) from failure
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, IndexError) as failure:
        raise UserError(
            f"the file is not a complete manifest of this version: {failure}",
            where=str(source),
            remedy="delete it and index the shards again",
        ) from failure


def _info(header: dict[str, Any], folder: Path) -> ManifestInfo:
    shards = tuple(
        Shard(_found(s["path"], folder), s["bytes"], s["samples"]) for s in header["shards"]
    )
    return ManifestInfo(header["digest"], tuple(header["classes"]), shards)


def _found(recorded: str, folder: Path) -> str:
    return recorded if is_remote(recorded) else os.path.join(folder, recorded)


def _recorded(path: str, folder: Path) -> str:
    """Return the path relative to the manifest's folder if below it, so that a run can move with its shards."""
    if is_remote(path):
        return path
    full = Path(os.path.abspath(path))
    return str(full.relative_to(folder)) if full.is_relative_to(folder) else str(full)


# Not pyarrow's own conversions: they import pandas, which costs 0.1 s at every start.
def _as_arrow(column: np.ndarray, kind: type) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(column, kind))
    return pa.Array.from_buffers(pa.from_numpy_dtype(kind), len(column), [None, data])


def _as_numpy(column: pa.Array, kind: type) -> np.ndarray:
    if column.type != pa.from_numpy_dtype(kind) or column.null_count:
        raise ValueError(f"a column of {column.type} with {column.null_count} nulls")
    if not len(column):  # it has no buffer, or an empty one, which numpy refuses
        return np.empty(0, kind)
    start = column.offset * column.type.byte_width
    return np.frombuffer(column.buffers()[1], kind, len(column), start)
