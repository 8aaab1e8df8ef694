"""Soft targets on disk: one Parquet file per shard, one row per view and sample.

Rows are ordered by view, then in shard order. Columns: ``id`` int64, ``view`` int32, ``indices``
K x int32, ``log_probs`` K x float16. The file's metadata contain a SHA-256 of the columns, what the
targets belong to, the precision in which they were computed, and which samples are corrupt: their rows
are uniform.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError

META, CHECKSUM, CORRUPT = b"cnn2gnn.meta", b"cnn2gnn.sha256", b"cnn2gnn.corrupt"
PRECISION = b"cnn2gnn.precision"
DAMAGE = (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError)
"""Exceptions that reading a corrupt or unrelated file may raise."""
MEAN_ROWS = 4096
"""Samples at a time: 16 MB of a thousand classes."""
LEAST_REST = 1e-6
"""Minimum probability mass of the classes outside the top k, since float16 may round it away."""


def write_shard(
    path: Path,
    *,
    ids: np.ndarray,
    view_count: int,
    indices: np.ndarray,
    log_probs: np.ndarray,
    meta: dict[str, Any],
    corrupt: Mapping[int, str] | None = None,
    precision: str | None = None,
) -> None:
    """Write one shard's targets: temporary file, fsync, atomic rename.

    Args:
        path: the file.
        ids: [n] sample ids.
        view_count: V.
        indices: [V, n, K] int32 classes.
        log_probs: [V, n, K] float16 of these classes.
        meta: what the targets belong to (JSON), compared by ``is_complete``.
        corrupt: corrupt samples and the reasons; see ``corrupt_samples``.
        precision: in which the teacher computed ("float32", "bfloat16"); None: it is not recorded.

    Raises:
        ValueError: inconsistent shapes.
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
    note = {META: as_note(meta), CHECKSUM: _checksum(columns)}
    if corrupt:
        note[CORRUPT] = json.dumps({str(sample): what for sample, what in corrupt.items()}).encode()
    if precision is not None:
        note[PRECISION] = precision.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata(note)
    with durable.replacing(path) as temporary:
        # No dictionary encoding: the numbers hardly repeat, and reading would take 2.5 times as long.
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False)


def is_complete(path: Path, meta: dict[str, Any]) -> bool:
    """Return whether the file exists, is intact, and belongs to these targets."""
    try:
        note, columns = _read(path)
    except DAMAGE:
        return False
    return note.get(META) == as_note(meta) and note.get(CHECKSUM) == _checksum(columns)


def corrupt_samples(path: Path) -> dict[int, str]:
    """Return the samples of an intact file whose images could not be read, and why."""
    note = (pq.read_metadata(path).metadata or {}).get(CORRUPT, b"{}")
    return {int(sample): str(what) for sample, what in json.loads(note).items()}


def precision_of(path: Path) -> str | None:
    """Return the precision in which an intact file's targets were computed; None: an older version wrote it."""
    note = pq.read_metadata(path).metadata or {}
    return note[PRECISION].decode() if PRECISION in note else None


class Targets:
    """The soft targets of a training set, in memory or memory-mapped (``data/target_arrays.py``).

    Attributes:
        views: V, the number of views that have targets.
        indices_VNK: classes in the smallest unsigned type that fits; None if all C classes are
            included (K = C), in class order.
        log_probs_VNK: log-probabilities of these classes, float16.
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
        """Read all ``.parquet`` files of a folder, or the given files, into memory.

        Args:
            files: a folder, or the files.
            num_samples: N of the training manifest.
            num_classes: C.
            meta: what the targets must belong to; None accepts any.

        Raises:
            UserError: a file is missing or corrupt, belongs to other targets than ``meta``, or has
                samples or classes out of range; a sample has no targets.
        """
        if isinstance(files, str | Path):
            files = sorted(Path(files).glob("*.parquet"))
        layout, covered_VN = None, np.zeros((1, num_samples), bool)
        for path in map(Path, files):
            columns = _checked(path, meta)
            if not len(columns["id"]):
                continue
            if layout is None:
                views, k = int(columns["view"].max()) + 1, columns["indices"].shape[1]
                layout = Layout.checked(path, views, num_samples, k, num_classes)
                log_probs = np.zeros(layout.shape, np.float16)
                indices = None if layout.full else np.zeros(layout.shape, layout.kind)
                covered_VN = np.zeros(layout.shape[:2], bool)
            rows = _Rows.of(path, columns, layout)
            log_probs[rows.view, rows.ids] = rows.log_probs
            if indices is not None:
                indices[rows.view, rows.ids] = rows.indices
            covered_VN[rows.view, rows.ids] = True
        check_covered(covered_VN)
        return cls(indices, log_probs, num_classes)

    def lookup(self, ids: np.ndarray, view: int) -> np.ndarray:
        """Return the log-probabilities [B, C] float32 of a view (taken mod V).

        The mass outside the top k is spread evenly over the other classes; the probabilities of each
        row sum to 1 regardless of float16 rounding.
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

    def mean(self) -> np.ndarray:
        """Mean probabilities [C] float64 of the first view, over all samples but those of ``uniform``."""
        total_C, counted = np.zeros(self.num_classes), 0
        uniform_N = self.uniform()
        for first in range(0, len(uniform_N), MEAN_ROWS):
            rows = first + np.flatnonzero(~uniform_N[first : first + MEAN_ROWS])
            total_C += np.exp(self.lookup(rows, 0)).sum(0, dtype=np.float64)
            counted += len(rows)
        return total_C / max(counted, 1)

    def uniform(self) -> np.ndarray:
        """Bool [N]: the samples whose first view has the same probability in all classes: corrupt images.

        None if all are, which is not due to corrupt images.
        """
        even = np.float16(-np.log(np.float32(self.num_classes)))
        samples = self.log_probs_VNK.shape[1]
        found_N = np.zeros(samples, bool)
        for first in range(0, samples, MEAN_ROWS):
            rows = slice(first, first + MEAN_ROWS)
            found_N[rows] = (self.log_probs_VNK[0, rows] == even).all(1)
        return found_N & ~found_N.all()


@dataclass(frozen=True)
class Layout:
    """Shape of a training set's targets: V views, N samples, K of C classes each."""

    views: int
    samples: int
    k: int
    classes: int

    @classmethod
    def checked(cls, path: Path, views: int, samples: int, k: int, classes: int) -> Layout:
        """Return the layout that a file implies.

        Raises:
            UserError: it has more classes per sample than there are, or none.
        """  # noqa: DOC501
        if not 1 <= k <= classes:
            raise unfit(path, f"it has {k} of {classes} classes per sample")
        return cls(views, samples, k, classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[V, N, K]."""
        return self.views, self.samples, self.k

    @property
    def full(self) -> bool:
        """Whether all classes are included, in class order: indices need not be stored."""
        return self.k == self.classes

    @property
    def kind(self) -> np.dtype:
        """The smallest unsigned integer type that fits a class."""
        return np.min_scalar_type(self.classes - 1)


@dataclass(frozen=True)
class _Rows:
    """The n rows of a file: their places (``view``, ``ids`` [n]) and values ([n, K])."""

    view: np.ndarray
    ids: np.ndarray
    indices: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def of(cls, path: Path, columns: dict[str, np.ndarray], layout: Layout) -> _Rows:
        ids, view, indices = columns["id"], columns["view"], columns["indices"]
        if (int(view.max()) + 1, indices.shape[1]) != (layout.views, layout.k):
            raise unfit(path, "its views or its k differ from those of the other files")
        if min(ids.min(), view.min()) < 0 or ids.max() >= layout.samples:
            raise unfit(
                path, f"it has sample ids up to {ids.max()}, but there are {layout.samples} samples"
            )
        if indices.min() < 0 or indices.max() >= layout.classes:
            raise unfit(
                path, f"it has class {indices.max()}, but there are {layout.classes} classes"
            )
        log_probs = columns["log_probs"]
        if layout.full:  # sort into class order
            by_class = np.argsort(indices, axis=1)
            indices = np.take_along_axis(indices, by_class, 1)
            if (indices != np.arange(layout.classes)).any():
                raise unfit(path, "a class occurs twice in one row")
            log_probs = np.take_along_axis(log_probs, by_class, 1)
        return cls(view, ids, indices.astype(layout.kind), log_probs)


def read_rows(path: Path, meta: dict[str, Any] | None, layout: Layout) -> _Rows | None:
    """Read and validate the rows of a file; None if it has none.

    Raises:
        UserError: as ``Targets.load``.
    """
    columns = _checked(path, meta)
    return _Rows.of(path, columns, layout) if len(columns["id"]) else None


def check_covered(covered_VN: np.ndarray) -> None:
    """Check that every sample has targets.

    Raises:
        UserError: some have none.
    """
    missing = int((~covered_VN.all(0)).sum())
    if missing or not covered_VN.size:
        raise UserError(
            f"{missing} of {covered_VN.shape[1]} samples have no soft targets",
            where="targets",
            remedy="run `cnn2gnn targets` again: it writes what is missing",
        )


def _checked(path: Path, meta: dict[str, Any] | None) -> dict[str, np.ndarray]:
    try:
        note, columns = _read(path)
    except FileNotFoundError:
        raise UserError(
            "a soft-target file is missing",
            where=str(path),
            remedy="run `cnn2gnn targets` again: it writes what is missing",
        ) from None
    except DAMAGE as error:
        raise unfit(path, str(error)) from None
    if note.get(CHECKSUM) != _checksum(columns):
        raise unfit(path, "its checksum does not match")
    if meta is not None and note.get(META) != as_note(meta):
        raise unfit(path, "it belongs to different targets")
    return columns


def unfit(path: Path, what: str) -> UserError:
    """Return the error for a file that can't be used."""
    return UserError(
        f"this soft-target file can't be used: {what}",
        where=str(path),
        remedy="remove it and run `cnn2gnn targets` again: it writes what is missing",
    )


def _read(path: Path) -> tuple[dict[bytes, bytes], dict[str, np.ndarray]]:
    """Return the file's metadata and its columns: id and view [rows], indices and log_probs [rows, K]."""
    with pq.ParquetFile(path) as file:
        table = file.read()
    columns = {name: table[name].to_numpy() for name in ("id", "view")}
    for name in ("indices", "log_probs"):
        values = table[name].combine_chunks().flatten()
        columns[name] = values.to_numpy(zero_copy_only=False).reshape(
            -1, table.schema.field(name).type.list_size
        )
    return table.schema.metadata or {}, columns


def as_note(meta: dict[str, Any]) -> bytes:
    """Encode what targets belong to, as in a file's metadata."""
    return json.dumps(meta, sort_keys=True).encode()


def _checksum(columns: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).data)
    return digest.hexdigest().encode()
