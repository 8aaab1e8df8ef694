"""The manifest: one row per sample, with the byte range of its image and its class.

A sample's id is its row number; the samples of a shard are contiguous rows in tar order.
On disk it is one file that is memory-mapped when loaded (see :mod:`.manifest_file`).

Name suffixes: N samples, S shards, C classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnn2gnn_dist.data.index import manifest_file
from cnn2gnn_dist.data.index.build import IndexedShards, gather, in_order
from cnn2gnn_dist.data.index.class_matching import class_names, refuse_empty_classes
from cnn2gnn_dist.data.index.manifest_file import Shard
from cnn2gnn_dist.data.index.shard_rows import COLUMNS
from cnn2gnn_dist.data.index.split import split_per_class
from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.data.storage.shard_paths import expand
from cnn2gnn_dist.errors import UserError

__all__ = ["Manifest", "Shard", "expand", "index", "split_per_class"]

_CHUNK = 1 << 16  # keys hashed at a time


@dataclass(frozen=True, eq=False)
class Manifest:
    """N samples in S shards. Arrays may be read-only views of a memory-mapped file.

    Attributes:
        shards: the S tar files; a selection keeps all of them, so that ``shard_N`` stays valid.
        classes: the C class names.
        shard_N: shard of each sample, int32, non-decreasing.
        offset_N: first byte of the image in the shard, int64.
        size_N: size of the image in bytes, int32.
        label_N: class of the sample, int32; -1 is none.
        row_in_shard_N: position of the sample among all samples of its shard, int32; a selection
            keeps it, so that files with one row per sample of the shard stay aligned.
        keys: the samples' keys, a pyarrow string array.
        crc_N: CRC-32 of the image's bytes, uint32; None if not computed.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    shard_N: np.ndarray
    offset_N: np.ndarray
    size_N: np.ndarray
    label_N: np.ndarray
    row_in_shard_N: np.ndarray
    keys: pa.StringArray
    crc_N: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {len(self._column(name)) for name in COLUMNS} | {len(self.keys)}
        if self.crc_N is not None:
            lengths.add(len(self.crc_N))
        if len(lengths) != 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")
        if np.any(np.diff(self.shard_N) < 0):
            raise ValueError("samples of a shard must be contiguous rows")

    def _column(self, name: str) -> np.ndarray:
        column: np.ndarray = getattr(self, f"{name}_N")
        return column

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def num_classes(self) -> int:
        """The number of classes C, including those without samples."""
        return len(self.classes)

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        key: str = self.keys[int(row)].as_py()
        return key

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """Rows of each shard in this manifest, int64 [S]; zero for shards with none selected."""
        return np.bincount(self.shard_N, minlength=len(self.shards)).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """Hash (hex) of all rows, the class names, and the shards' file names and sizes.

        It excludes folders and hosts, so that moved data keeps its digest, and the bytes of the images and
        their checksums, so that a run can resume if checksums are computed later.
        """
        digest = hashlib.sha256()
        shards = [(_file_name(s.path), s.bytes, s.samples) for s in self.shards]
        digest.update(json.dumps([manifest_file.VERSION, shards, self.classes]).encode())
        for name, kind in COLUMNS.items():
            digest.update(np.ascontiguousarray(self._column(name), kind).data)
        none, feed = (pa.scalar(text, self.keys.type) for text in ("", "\n"))
        for start in range(0, len(self), _CHUNK):
            keys = self.keys.slice(start, _CHUNK)
            lines = pc.binary_join_element_wise(keys, none, feed)  # each key plus a line feed
            digest.update(lines.buffers()[2] or b"")
        return digest.hexdigest()[:32]

    def select(self, rows: np.ndarray) -> Manifest:
        """Return the manifest of a subset of the rows (strictly ascending), e.g. one side of a split.

        Raises:
            ValueError: the rows are not strictly ascending or out of range.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (np.any(np.diff(rows) <= 0) or rows[0] < 0 or rows[-1] >= len(self)):
            raise ValueError("rows must be strictly ascending and within the manifest")
        columns: dict[str, Any] = {f"{name}_N": self._column(name)[rows] for name in COLUMNS}
        if self.crc_N is not None:
            columns["crc_N"] = self.crc_N[rows]
        return dataclasses.replace(self, **columns, keys=self.keys.take(pa.array(rows)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest by atomic rename.

        Paths of shards below the manifest's folder are stored relative to it, others as absolute paths.
        """
        columns = {name: self._column(name) for name in COLUMNS}
        if self.crc_N is not None:
            columns["crc"] = self.crc_N
        manifest_file.write(
            Path(path),
            manifest_file.ManifestInfo(self.digest, self.classes, self.shards),
            columns,
            self.keys,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Memory-map a saved manifest.

        Raises:
            UserError: the file is missing, corrupt, or not a manifest of this version.
        """

        def make(
            info: manifest_file.ManifestInfo, columns: dict[str, np.ndarray], keys: pa.Array
        ) -> Manifest:
            shard_N = columns["shard"]
            if len(shard_N) and not 0 <= shard_N[0] <= shard_N[-1] < len(info.shards):
                raise ValueError("a sample refers to a shard that is not listed")
            named: dict[str, Any] = {f"{name}_N": column for name, column in columns.items()}
            manifest = cls(info.shards, info.classes, **named, keys=keys)
            manifest.__dict__["digest"] = info.digest  # preset the cached_property
            return manifest

        return manifest_file.read(Path(path), make)

    def check_shards(self) -> None:
        """Compare the lengths of the shard files with the recorded lengths.

        Raises:
            UserError: a shard is missing, truncated or changed (names the first, counts all).
        """
        far = any(urls.is_remote(shard.path) for shard in self.shards)
        checked = in_order(_difference, self.shards, 8 if far else 1)
        wrong = [
            (shard.path, what) for shard, what in zip(self.shards, checked, strict=True) if what
        ]
        if wrong:
            path, what = wrong[0]
            others = f" ({len(wrong) - 1} more shards are affected)" if len(wrong) > 1 else ""
            raise UserError(
                f"a shard {what}{others}",
                where=path,
                remedy="restore the file, or index the shards again if the change is intended",
            )


def _file_name(path: str) -> str:
    # Drop the query of a URL: it holds signatures that change from day to day.
    return (
        posixpath.basename(urlsplit(path).path) if urls.is_remote(path) else os.path.basename(path)
    )


def _difference(shard: Shard) -> str:
    """Describe how a shard's file differs from the recorded one; empty if it doesn't."""
    try:
        found = urls.size(shard.path) if urls.is_remote(shard.path) else os.stat(shard.path).st_size
    except OSError as failure:
        return f"cannot be read ({failure.strerror})"
    except UserError as failure:
        return f"cannot be read ({failure.what})"
    if found == shard.bytes:
        return ""
    kind = "is truncated" if found < shard.bytes else "has changed"
    return f"{kind}: {found:,} bytes, {shard.bytes:,} when indexed"


def index(
    shards: Sequence[Path | str],
    *,
    classes: Sequence[str] | None = None,
    progress: bool = True,
    require_labels: bool = True,
    allow_empty_classes: bool = False,
    checksums: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Walk the shards' headers and build their manifest; payloads are not read except for labels.

    Args:
        shards: tar files or their URLs, in row order.
        classes: the class names. Without them, the number of classes follows from the highest label (or
            from ``PREFIX-classes.json`` next to local shards), and names come from that list or from
            ``class_name`` in the samples' ``.json``, else the class number is the name.
        progress: show a progress bar when on a terminal.
        require_labels: refuse samples without ``.cls``; otherwise their label is -1.
        allow_empty_classes: accept classes without samples (a subset of a larger data set).
        checksums: also read the images and record their CRC-32; always on when a shard is remote.
        workers: threads; more than one pays off where reads have latency (a network file system).
            Default: 1, or 4 when a shard is remote.

    Raises:
        UserError: a shard is unreadable (see :func:`cnn2gnn_dist.data.tar.samples.samples`) or has no
            samples; a sample has no image, no ``.cls``, or a ``.cls`` that is not a class number; a
            class is empty or has two names; there are no samples at all.
    """
    refuse_none(shards)
    found = gather(
        shards,
        num_classes=None if classes is None else len(classes),
        names=classes is None,
        require_labels=require_labels,
        checksums=checksums,
        workers=workers,
        progress=progress,
    )
    names = tuple(classes) if classes is not None else class_names(found.class_info)
    label_N = found.columns["label_N"]
    if not allow_empty_classes:
        refuse_empty_classes(
            label_N, names, numbered=classes is None and not found.class_info.names
        )
    return manifest_of(found, names, label_N)


def refuse_none(shards: Sequence[Path | str]) -> None:
    """Refuse an empty list of shards.

    Raises:
        UserError: it is empty.
    """
    if not shards:
        raise UserError("no shards were given", remedy="name at least one shard, glob or folder")


def manifest_of(found: IndexedShards, classes: tuple[str, ...], label_N: np.ndarray) -> Manifest:
    """Make a manifest of the gathered rows with these class names and labels."""
    columns = {**found.columns, "label_N": np.ascontiguousarray(label_N, COLUMNS["label"])}
    return Manifest(found.shards, classes, **columns, keys=found.keys, crc_N=found.crc_N)
