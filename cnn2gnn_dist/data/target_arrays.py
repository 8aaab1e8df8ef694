"""Soft targets as arrays on disk, built once from the Parquet files and memory-mapped by a host's processes.

``dense/`` next to the files contains ``log_probs.npy``, ``indices.npy`` (unless all classes are kept)
and ``note.json``: what it was made from, and checksums. Several ranks fill ``dense.tmp/``, each with the
rows of its files; one rank writes the note and renames. A folder without a valid note counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.soft_targets import (
    CHECKSUM,
    DAMAGE,
    META,
    Layout,
    Targets,
    as_note,
    check_covered,
    read_rows,
    unfit,
)

FOLDER = "dense"
NOTE = "note.json"


@dataclass(frozen=True)
class TargetFiles:
    """Soft-target files from which the arrays are built, and their layout.

    ``digest``: digest of everything the arrays depend on; if it changes, the arrays are rebuilt.
    """

    files: tuple[Path, ...]
    meta: dict[str, Any]
    layout: Layout
    digest: str


def describe(
    files: Sequence[Path], num_samples: int, num_classes: int, meta: dict[str, Any]
) -> TargetFiles:
    """Describe these files from their footers; contents are validated when they are read.

    Raises:
        UserError: no file has a row; a file is missing or corrupt, or of other targets than ``meta``.
    """  # noqa: DOC501
    found = hashlib.sha256(json.dumps([num_samples, num_classes]).encode())
    layout: Layout | None = None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                note, rows = file.metadata.metadata or {}, file.metadata.num_rows
                if note.get(META) != as_note(meta):
                    raise unfit(path, "it belongs to different targets")
                found.update(note[CHECKSUM])
                if layout is None and rows:
                    views = int(file.read(columns=["view"])["view"].to_numpy().max()) + 1
                    k = int(file.schema_arrow.field("indices").type.list_size)
                    layout = Layout.checked(path, views, num_samples, k, num_classes)
        except DAMAGE as error:
            raise unfit(path, str(error)) from None
    if layout is None:
        check_covered(np.zeros((1, num_samples), bool))
        raise AssertionError("no samples, no targets")
    return TargetFiles(tuple(files), meta, layout, found.hexdigest())


def is_complete(root: Path, wanted: TargetFiles) -> bool:
    """Return whether ``root/dense`` was made from this source and is unmodified (reads all of it)."""
    folder = root / FOLDER
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return note["digest"] == wanted.digest and all(
            durable.sha256(folder / name) == note["files"][name] for name in _arrays(wanted.layout)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checksums(root: Path) -> dict[str, str]:
    """SHA-256 of each array of complete targets, as it was when they were finished."""
    note = json.loads((root / FOLDER / NOTE).read_text(encoding="utf-8"))
    return {str(name): str(sha) for name, sha in note["files"].items()}


def create(root: Path, wanted: TargetFiles) -> None:
    """Allocate disk space for the arrays (one rank); remove what a killed run has left behind.

    Raises:
        UserError: disk full.
        OSError: the folder is not writable.
    """
    for left in (root / FOLDER, _unfinished(root)):
        if left.exists():
            shutil.rmtree(left)
    _unfinished(root).mkdir()
    try:
        for name, kind in _arrays(wanted.layout).items():
            durable.reserve_array(_unfinished(root) / name, wanted.layout.shape, kind)
    except BaseException:
        shutil.rmtree(_unfinished(root), ignore_errors=True)
        raise


def fill(root: Path, wanted: TargetFiles, files: Iterable[Path]) -> np.ndarray:
    """Write the rows of these files to their places and sync; return bool [V, N]: which were written.

    Does not use a memory map: ranks on several hosts would overwrite each other's rows within a page.

    Raises:
        UserError: as ``Targets.load``.
    """
    covered_VN = np.zeros(wanted.layout.shape[:2], bool)
    with ExitStack() as stack:
        arrays = {
            name: stack.enter_context(_Array(_unfinished(root) / name, wanted.layout))
            for name in _arrays(wanted.layout)
        }
        for path in files:
            rows = read_rows(path, wanted.meta, wanted.layout)
            if rows is None:
                continue
            places = rows.view.astype(np.int64) * wanted.layout.samples + rows.ids
            for name, values in (("log_probs.npy", rows.log_probs), ("indices.npy", rows.indices)):
                if name in arrays:
                    arrays[name].put(places, values)
            covered_VN[rows.view, rows.ids] = True
    return covered_VN


def unfinished_arrays(root: Path, wanted: TargetFiles) -> list[Path]:
    """Paths of the arrays between ``create`` and ``finish``."""
    return [_unfinished(root) / name for name in _arrays(wanted.layout)]


def finish(root: Path, wanted: TargetFiles, covered_VN: np.ndarray) -> None:
    """Finalize the arrays when all ranks have filled them (one rank).

    Raises:
        UserError: a sample has no targets.
    """
    folder = _unfinished(root)
    check_covered(covered_VN)
    files = {name: durable.sha256(folder / name) for name in _arrays(wanted.layout)}
    note = {"digest": wanted.digest, "files": files, **asdict(wanted.layout)}
    durable.write_text(folder / NOTE, json.dumps(note, indent=1))
    durable.sync(folder)
    os.replace(folder, root / FOLDER)
    durable.sync(root)


def opened(root: Path, layout: Layout) -> Targets:
    """Memory-map the targets: pages are read on lookup, once for all processes of a host."""
    folder = root / FOLDER
    indices = None if layout.full else np.load(folder / "indices.npy", mmap_mode="r")
    log_probs = np.load(folder / "log_probs.npy", mmap_mode="r")
    return Targets(indices, log_probs, layout.classes)


class _Array:
    """An array file that is written row by row, not through a memory map."""

    def __init__(self, path: Path, layout: Layout) -> None:
        shaped = np.load(path, mmap_mode="r")
        self.path, self.start, self.kind = path, int(shaped.offset), shaped.dtype
        self.row_bytes = layout.k * self.kind.itemsize

    def __enter__(self) -> _Array:
        self.file = os.open(self.path, os.O_WRONLY)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self.file)
        finally:
            os.close(self.file)

    def put(self, places_n: np.ndarray, values_nK: np.ndarray) -> None:
        """Write rows to their places, contiguous ones in one call."""
        with durable.disk_full_reported(self.path, resumes=True):
            for first, last in _runs(places_n):
                rows = np.ascontiguousarray(values_nK[first:last], self.kind)
                data = rows.reshape(-1).view(np.uint8).data
                offset = self.start + int(places_n[first]) * self.row_bytes
                while data:
                    written = os.pwrite(self.file, data, offset)
                    data, offset = data[written:], offset + written


def _runs(places_n: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield spans of consecutive places."""
    breaks = (np.flatnonzero(np.diff(places_n) != 1) + 1).tolist()
    yield from zip([0, *breaks], [*breaks, len(places_n)], strict=True)


def _arrays(layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = {"log_probs.npy": np.float16}
    return found if layout.full else {**found, "indices.npy": layout.kind}


def _unfinished(root: Path) -> Path:
    return root / f"{FOLDER}.tmp"
