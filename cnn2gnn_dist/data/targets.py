"""Soft targets on disk: one Parquet file a shard, a row for each view and sample.

Rows lie view by view, inside a view in the shard's order. Columns: ``id`` int64, ``view``
int32, ``indices`` K x int32, ``log_probs`` K x float16. The file's metadata carry a SHA-256
of the columns and what the targets belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnn2gnn_dist.errors import UserError

META, CHECKSUM = b"cnn2gnn.meta", b"cnn2gnn.sha256"


def write_shard(
    path: Path,
    *,
    ids: np.ndarray,
    view_count: int,
    indices: np.ndarray,
    log_probs: np.ndarray,
    meta: dict[str, Any],
) -> None:
    """Write one shard's targets: to a temporary name, synced, renamed.

    Args:
        ids: [n] sample ids.
        indices: [V, n, K] int32 classes; log_probs: [V, n, K] float16 of these classes.
        meta: what the targets belong to, compared by ``is_whole``.
    """
    views, n, k = indices.shape
    if (views, n) != (view_count, len(ids)) or log_probs.shape != indices.shape:
        raise ValueError(f"shapes {indices.shape}, {log_probs.shape} for {view_count} x {len(ids)}")
    columns = {
        "id": np.tile(np.asarray(ids, np.int64), views),
        "view": np.repeat(np.arange(views, dtype=np.int32), n),
        "indices": np.ascontiguousarray(indices.reshape(-1), np.int32),
        "log_probs": np.ascontiguousarray(log_probs.reshape(-1), np.float16),
    }
    table = pa.table(
        {
            "id": columns["id"],
            "view": columns["view"],
            "indices": pa.FixedSizeListArray.from_arrays(pa.array(columns["indices"]), k),
            "log_probs": pa.FixedSizeListArray.from_arrays(pa.array(columns["log_probs"]), k),
        }
    )
    note = {META: json.dumps(meta, sort_keys=True).encode(), CHECKSUM: _checksum(columns)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table.replace_schema_metadata(note), temporary, compression="zstd")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def is_whole(path: Path, meta: dict[str, Any]) -> bool:
    """Whether the file is there, undamaged, and of these targets."""
    try:
        table, columns = _read(path)
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return False
    note = table.schema.metadata or {}
    return note.get(META) == json.dumps(meta, sort_keys=True).encode() and note.get(
        CHECKSUM
    ) == _checksum(columns)


class Targets:
    """The soft targets of a whole training set.

    Attributes:
        views: V, the number of views that have targets.
    """

    def __init__(self, indices: np.ndarray, log_probs: np.ndarray, num_classes: int) -> None:
        self.indices_VNK, self.log_probs_VNK = indices, log_probs
        self.num_classes = num_classes
        self.views = len(indices)

    @classmethod
    def load(cls, folder: Path, num_samples: int, num_classes: int) -> Targets:
        """Read all files of a folder.

        Raises:
            UserError: a damaged file, a sample without targets, classes outside.
        """
        return cls.of_files(sorted(Path(folder).glob("*.parquet")), num_samples, num_classes)

    @classmethod
    def of_files(cls, files: Iterable[Path], num_samples: int, num_classes: int) -> Targets:
        """Read these files."""
        indices: np.ndarray | None = None
        log_probs = np.empty(0)
        covered: np.ndarray = np.zeros((0, num_samples), bool)
        for path in files:
            columns = _checked(path)
            k = len(columns["indices"]) // max(len(columns["id"]), 1)
            views = int(columns["view"].max()) + 1
            if indices is None:
                indices = np.zeros((views, num_samples, k), np.int32)
                log_probs = np.zeros((views, num_samples, k), np.float16)
                covered = np.zeros((views, num_samples), bool)
            if (
                indices.shape[0] != views
                or indices.shape[2] != k
                or columns["id"].max() >= num_samples
            ):
                raise _unfit(path, "it belongs to other targets")
            if columns["indices"].max() >= num_classes:
                raise _unfit(path, f"class {columns['indices'].max()} of {num_classes}")
            where = (columns["view"], columns["id"])
            indices[where] = columns["indices"].reshape(-1, k)
            log_probs[where] = columns["log_probs"].reshape(-1, k)
            covered[where] = True
        if indices is None or not covered.all():
            missing = num_samples if indices is None else int((~covered.all(0)).sum())
            raise UserError(
                f"{missing} samples have no soft targets",
                where="targets",
                remedy="run `cnn2gnn targets`: it writes what is missing",
            )
        return cls(indices, log_probs, num_classes)

    def lookup(self, ids: np.ndarray, view: int) -> np.ndarray:
        """Log-probabilities [B, C] float32 of a view (taken mod V).

        The mass outside the top k is spread evenly over the other classes; each row's
        probabilities sum to 1 whatever float16 has rounded.
        """
        view %= self.views
        indices = self.indices_VNK[view, ids]
        kept = np.exp(self.log_probs_VNK[view, ids].astype(np.float32))
        rest = self.num_classes - indices.shape[1]
        spare = np.maximum(1.0 - kept.sum(1, keepdims=True), 1e-6 if rest else 0.0)
        full = np.repeat(spare / max(rest, 1), self.num_classes, axis=1).astype(np.float32)
        np.put_along_axis(full, indices.astype(np.int64), kept, axis=1)
        full = np.maximum(full, 1e-12)
        return np.log(full / full.sum(1, keepdims=True))


def _checked(path: Path) -> dict[str, np.ndarray]:
    try:
        table, columns = _read(path)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _unfit(path, str(error)) from None
    if (table.schema.metadata or {}).get(CHECKSUM) != _checksum(columns):
        raise _unfit(path, "its checksum does not hold")
    return columns


def _unfit(path: Path, what: str) -> UserError:
    return UserError(
        f"this file of soft targets can't be used: {what}",
        where=str(path),
        remedy="remove it and run `cnn2gnn targets` again: it writes what is missing",
    )


def _read(path: Path) -> tuple[pa.Table, dict[str, np.ndarray]]:
    table = pq.read_table(path)
    lists = {name: table[name].combine_chunks() for name in ("indices", "log_probs")}
    return table, {
        "id": table["id"].to_numpy(),
        "view": table["view"].to_numpy(),
        "indices": lists["indices"].flatten().to_numpy(),
        "log_probs": lists["log_probs"].flatten().to_numpy(zero_copy_only=False),
    }


def _checksum(columns: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest().encode()
