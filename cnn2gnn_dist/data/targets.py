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
DAMAGE = (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError)
"""What reading a damaged or foreign file may raise."""
LEAST_REST = 1e-6
"""Mass left to the classes outside the top k when float16 rounds it away."""


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
        meta: what the targets belong to (JSON), compared by ``is_whole``.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    views, n, k = indices.shape
    if (views, n) != (view_count, len(ids)) or log_probs.shape != indices.shape:
        raise ValueError(f"shapes {indices.shape}, {log_probs.shape} for {view_count} x {len(ids)}")
    columns: dict[str, np.ndarray] = {
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
    note = {META: _as_note(meta), CHECKSUM: _checksum(columns)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table.replace_schema_metadata(note), temporary, compression="zstd")
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def is_whole(path: Path, meta: dict[str, Any]) -> bool:
    """Whether the file is there, undamaged, and of these targets."""
    try:
        note, columns = _read(path)
    except DAMAGE:
        return False
    return note.get(META) == _as_note(meta) and note.get(CHECKSUM) == _checksum(columns)


class Targets:
    """The soft targets of a whole training set.

    Attributes:
        views: V, the number of views that have targets.
        indices_VNK: int32 classes; None when all C classes are there (K = C), in class order.
        log_probs_VNK: float16 of these classes.
    """

    def __init__(self, indices: np.ndarray | None, log_probs: np.ndarray, num_classes: int) -> None:
        self.indices_VNK, self.log_probs_VNK = indices, log_probs
        self.num_classes = num_classes
        self.views = len(log_probs)

    @classmethod
    def load(
        cls,
        files: str | Path | Iterable[str | Path],
        num_samples: int,
        num_classes: int,
        meta: dict[str, Any] | None = None,
    ) -> Targets:
        """Read all ``.parquet`` files of a folder, or these files.

        Args:
            meta: what the targets must belong to; None takes any.

        Raises:
            UserError: a missing or damaged file, of other targets than ``meta`` says, of samples
                or classes outside; a sample without targets.
        """
        if isinstance(files, str | Path):
            files = sorted(Path(files).glob("*.parquet"))
        made: _Filling | None = None
        for path in map(Path, files):
            columns = _checked(path, meta)
            if len(columns["id"]):
                made = made or _Filling(path, columns, num_samples, num_classes)
                made.add(path, columns)
        missing = num_samples if made is None else int((~made.covered_VN.all(0)).sum())
        if made is None or missing:
            raise UserError(
                f"{missing} of {num_samples} samples have no soft targets",
                where="targets",
                remedy="run `cnn2gnn targets` again: it writes what is missing",
            )
        return cls(made.indices_VNK, made.log_probs_VNK, num_classes)

    def lookup(self, ids: np.ndarray, view: int) -> np.ndarray:
        """Log-probabilities [B, C] float32 of a view (taken mod V).

        The mass outside the top k is spread evenly over the other classes; each row's
        probabilities sum to 1 whatever float16 has rounded.
        """
        view %= self.views
        kept = self.log_probs_VNK[view, ids].astype(np.float32)
        if self.indices_VNK is None:
            top = kept.max(1, keepdims=True)
            return kept - (top + np.log(np.exp(kept - top).sum(1, keepdims=True)))
        kept = np.exp(kept)
        rest = self.num_classes - kept.shape[1]
        spare = np.maximum(1.0 - kept.sum(1, keepdims=True), LEAST_REST) / rest
        full = np.repeat(spare.astype(np.float32), self.num_classes, axis=1)
        np.put_along_axis(full, self.indices_VNK[view, ids].astype(np.int64), kept, axis=1)
        full = np.maximum(full, 1e-12)
        return np.log(full / full.sum(1, keepdims=True))


class _Filling:
    """The dense arrays, file after file."""

    def __init__(
        self, path: Path, columns: dict[str, np.ndarray], num_samples: int, num_classes: int
    ) -> None:
        self.num_classes = num_classes
        views, k = int(columns["view"].max()) + 1, columns["indices"].shape[1]
        if not 1 <= k <= num_classes:
            raise _unfit(path, f"it has {k} of {num_classes} classes a sample")
        self.full = k == num_classes
        shape = (views, num_samples, k)
        self.log_probs_VNK = np.zeros(shape, np.float16)
        self.indices_VNK = None if self.full else np.zeros(shape, np.int32)
        self.covered_VN = np.zeros(shape[:2], bool)

    def add(self, path: Path, columns: dict[str, np.ndarray]) -> None:
        """Put a file's rows at their places."""
        views, samples = self.covered_VN.shape
        ids, view, indices = columns["id"], columns["view"], columns["indices"]
        if (int(view.max()) + 1, indices.shape[1]) != (views, self.log_probs_VNK.shape[2]):
            raise _unfit(path, "it has other views or another k than the other files")
        if min(ids.min(), view.min()) < 0 or ids.max() >= samples:
            raise _unfit(path, f"it has sample ids to {ids.max()}, of {samples} samples")
        if indices.min() < 0 or indices.max() >= self.num_classes:
            raise _unfit(path, f"it has class {indices.max()}, of {self.num_classes} classes")
        log_probs = columns["log_probs"]
        if self.indices_VNK is None:  # into class order: then the classes need no room
            by_class = np.argsort(indices, axis=1)
            if (np.take_along_axis(indices, by_class, 1) != np.arange(self.num_classes)).any():
                raise _unfit(path, "a class comes twice in a row")
            log_probs = np.take_along_axis(log_probs, by_class, 1)
        else:
            self.indices_VNK[view, ids] = indices
        self.log_probs_VNK[view, ids] = log_probs
        self.covered_VN[view, ids] = True


def _checked(path: Path, meta: dict[str, Any] | None) -> dict[str, np.ndarray]:
    try:
        note, columns = _read(path)
    except FileNotFoundError:
        raise UserError(
            "a file of soft targets is missing",
            where=str(path),
            remedy="run `cnn2gnn targets` again: it writes what is missing",
        ) from None
    except DAMAGE as error:
        raise _unfit(path, str(error)) from None
    if note.get(CHECKSUM) != _checksum(columns):
        raise _unfit(path, "its checksum does not hold")
    if meta is not None and note.get(META) != _as_note(meta):
        raise _unfit(path, "it belongs to other targets")
    return columns


def _unfit(path: Path, what: str) -> UserError:
    return UserError(
        f"this file of soft targets can't be used: {what}",
        where=str(path),
        remedy="remove it and run `cnn2gnn targets` again: it writes what is missing",
    )


def _read(path: Path) -> tuple[dict[bytes, bytes], dict[str, np.ndarray]]:
    """The file's metadata; its columns: id and view [rows], indices and log_probs [rows, K]."""
    with pq.ParquetFile(path) as file:
        table = file.read()
    columns = {name: table[name].to_numpy() for name in ("id", "view")}
    for name in ("indices", "log_probs"):
        values = table[name].combine_chunks().flatten()
        columns[name] = values.to_numpy(zero_copy_only=False).reshape(
            -1, table.schema.field(name).type.list_size
        )
    return table.schema.metadata or {}, columns


def _as_note(meta: dict[str, Any]) -> bytes:
    return json.dumps(meta, sort_keys=True).encode()


def _checksum(columns: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).data)
    return digest.hexdigest().encode()
