"""The manifest: one row a sample, saying where its image's bytes lie and which class it is of.

A sample's id is its row number; the samples of a shard are contiguous rows in the tar's order.
On disk it is one uncompressed record batch of Arrow IPC, memory-mapped when loaded (1.28 million
rows: 46 MB, opened in under a millisecond), with shards and classes as JSON in the metadata.

Suffixes of the names: N samples, S shards, C classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cnn2gnn_dist.data.expand import expand
from cnn2gnn_dist.data.rows import COLUMNS, IMAGE_SUFFIXES, Rows, class_names
from cnn2gnn_dist.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "Manifest", "Shard", "expand", "index", "split_per_class"]

_METADATA = b"cnn2gnn.manifest"
_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """A tar file: its path (absolute once loaded), its length in bytes, and all its samples."""

    path: str
    bytes: int
    samples: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """N samples over S shards. Arrays may be read-only views of a mapped file.

    Attributes:
        shards: the S tar files; a selection keeps them all, so that ``shard_N`` keeps its meaning.
        classes: the C class names.
        shard_N: the shard of each sample, int32, never falling.
        offset_N: first byte of the image in the shard, int64.
        size_N: bytes of the image, int32.
        label_N: class of the sample, int32; -1 is none.
        row_in_shard_N: position of the sample among all samples of its shard, int32; a selection
            keeps it, so that files with one row a sample of the shard stay aligned.
        keys: the samples' keys, a pyarrow string array.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    shard_N: np.ndarray
    offset_N: np.ndarray
    size_N: np.ndarray
    label_N: np.ndarray
    row_in_shard_N: np.ndarray
    keys: pa.StringArray

    def __post_init__(self) -> None:
        lengths = {len(self._column(name)) for name in COLUMNS} | {len(self.keys)}
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
        """The number of classes C, those without samples included."""
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

        Folders don't count, so data that moves keeps its digest; nor do the bytes of the images.
        """
        digest = hashlib.sha256()
        shards = [(os.path.basename(s.path), s.bytes, s.samples) for s in self.shards]
        digest.update(json.dumps([_VERSION, shards, self.classes]).encode())
        for name, kind in COLUMNS.items():
            digest.update(np.ascontiguousarray(self._column(name), kind).data)
        for key in self.keys.to_pylist():
            digest.update(key.encode() + b"\n")
        return digest.hexdigest()[:32]

    def select(self, rows: np.ndarray) -> Manifest:
        """Return the manifest of some rows (strictly ascending), e.g. one side of a split.

        Raises:
            ValueError: the rows are not strictly ascending or out of range.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (np.any(np.diff(rows) <= 0) or rows[0] < 0 or rows[-1] >= len(self)):
            raise ValueError("rows must be strictly ascending and within the manifest")
        columns: dict[str, Any] = {f"{name}_N": self._column(name)[rows] for name in COLUMNS}
        return dataclasses.replace(self, **columns, keys=self.keys.take(pa.array(rows)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest under a temporary name and rename it.

        Shards below the manifest's folder are recorded relative to it, others absolutely.
        """
        target = Path(path).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "version": _VERSION,
            "digest": self.digest,
            "classes": self.classes,
            "shards": [
                {**dataclasses.asdict(s), "path": _recorded(s.path, target.parent)}
                for s in self.shards
            ],
        }
        types = {name: pa.from_numpy_dtype(kind) for name, kind in COLUMNS.items()}
        schema = pa.schema(
            [*types.items(), ("key", pa.string())],
            metadata={_METADATA: json.dumps(header).encode()},
        )
        arrays = [pa.array(self._column(name), kind) for name, kind in types.items()]
        batch = pa.RecordBatch.from_arrays([*arrays, self.keys], schema=schema)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Map a saved manifest.

        Raises:
            UserError: the file is missing, damaged, or not a manifest of this version.
        """
        source = Path(path).absolute()
        try:
            # One batch, and the map stays open as long as the arrays that view it.
            batch = pa.ipc.open_file(pa.memory_map(str(source))).get_batch(0)
            header = json.loads(batch.schema.metadata[_METADATA])
            if header["version"] != _VERSION:
                raise ValueError(f"version {header['version']}, expected {_VERSION}")
            columns: dict[str, Any] = {
                f"{name}_N": batch.column(name).to_numpy(zero_copy_only=True) for name in COLUMNS
            }
            keys = batch.column("key")
        except FileNotFoundError as failure:
            raise UserError(
                "There is no manifest here.", where=str(source), remedy="Index the shards first."
            ) from failure
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, IndexError) as failure:
            raise UserError(
                f"The file is not a whole manifest of this version: {failure}.",
                where=str(source),
                remedy="Delete it and index the shards again.",
            ) from failure
        shards = tuple(
            Shard(str(source.parent / s["path"]), s["bytes"], s["samples"])
            for s in header["shards"]
        )
        manifest = cls(shards, tuple(header["classes"]), **columns, keys=keys)
        manifest.__dict__["digest"] = header["digest"]  # what cached_property would compute
        return manifest

    def check_shards(self) -> None:
        """Compare the files' lengths with those recorded.

        Raises:
            UserError: a shard is missing, truncated or changed (the first is named, all counted).
        """
        wrong: list[tuple[str, str]] = []
        for shard in self.shards:
            try:
                found = os.stat(shard.path).st_size
            except OSError as failure:
                wrong.append((shard.path, f"cannot be read ({failure.strerror})"))
                continue
            if found != shard.bytes:
                kind = "is truncated" if found < shard.bytes else "has changed"
                wrong.append((shard.path, f"{kind}: {found:,} bytes, {shard.bytes:,} when indexed"))
        if wrong:
            path, what = wrong[0]
            others = f" ({len(wrong) - 1} more shards are wrong)" if len(wrong) > 1 else ""
            raise UserError(
                f"A shard {what}{others}.",
                where=path,
                remedy="Restore the file, or index the shards again if the change is meant.",
            )


def _recorded(path: str, folder: Path) -> str:
    full = Path(os.path.abspath(path))
    return str(full.relative_to(folder)) if full.is_relative_to(folder) else str(full)


def split_per_class(
    manifest: Manifest, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split the rows of every class into (training, held out), each ascending int64.

    A class of n samples holds out round(fraction·n) of them, at least one if it has two or more,
    and never all. Which ones depends only on seed and keys, so neither the order of the samples
    nor their packing into shards matters. Samples without a label split as one
    more class.

    Raises:
        UserError: the fraction is not within [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(
            f"The held-out fraction is {fraction}.", remedy="Choose one from 0 to less than 1."
        )
    salt = int(seed).to_bytes(8, "little", signed=True)
    hash_N = np.frombuffer(
        b"".join(
            hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest()
            for key in manifest.keys.to_pylist()
        ),
        dtype="<u8",
    )
    # Rows class by class, inside a class by hash; equal hashes (equal keys) keep the rows' order.
    order_N = np.lexsort((hash_N, manifest.label_N))
    label_N = manifest.label_N[order_N]
    _, first_C, inverse_N, count_C = np.unique(
        label_N, return_index=True, return_inverse=True, return_counts=True
    )
    quota_C = np.rint(fraction * count_C).astype(np.int64)
    if fraction > 0:
        quota_C = np.clip(quota_C, np.minimum(count_C - 1, 1), np.maximum(count_C - 1, 0))
    held_N = np.arange(len(order_N)) - first_C[inverse_N] < quota_C[inverse_N]
    return np.sort(order_N[~held_N]), np.sort(order_N[held_N])


def index(
    shards: Sequence[Path | str],
    *,
    classes: Sequence[str] | None = None,
    progress: bool = True,
    require_labels: bool = True,
    allow_empty_classes: bool = False,
) -> Manifest:
    """Walk the shards' headers and make their manifest; of the payloads only labels are read.

    Args:
        shards: tar files, in the order of their rows.
        classes: the class names. Without them there are as many as the highest label says, named
            by ``class_name`` in a sample's ``.json``, else by number.
        progress: show a progress bar when on a terminal.
        require_labels: refuse samples without ``.cls``; otherwise their label is -1.
        allow_empty_classes: accept classes without samples (a subset of a larger data set).

    Raises:
        UserError: a shard is unreadable (see :func:`cnn2gnn_dist.data.tar.samples`) or holds no
            samples; a sample has no image or no ``.cls``, or one that is no class number; a class
            is empty; there are no samples at all.
    """
    from tqdm import tqdm

    if not shards:
        raise UserError("No shards are given.", remedy="Name at least one shard, glob or folder.")
    rows = Rows(None if classes is None else tuple(classes), require_labels)
    bar = tqdm(shards, desc="index", unit="shard", disable=None if progress else True)
    found = []
    for number, path in enumerate(map(os.path.abspath, bar)):
        length, count = rows.add(number, path)
        found.append(Shard(path, length, count))
    label_N = rows.column("label")
    names = rows.classes if rows.classes is not None else class_names(label_N, rows.names)
    _refuse_empty_classes(label_N, names, allow_empty_classes)
    columns: dict[str, Any] = {f"{name}_N": rows.column(name) for name in COLUMNS}
    return Manifest(tuple(found), names, **columns, keys=pa.array(rows.keys, pa.string()))


def _refuse_empty_classes(label_N: np.ndarray, names: tuple[str, ...], allowed: bool) -> None:
    count_C = np.bincount(label_N[label_N >= 0], minlength=len(names))
    empty = np.flatnonzero(count_C == 0)
    if allowed or not len(empty) or not np.any(label_N >= 0):
        return
    listed = ", ".join(
        f"{label} ('{names[label]}')" if names[label] != str(label) else str(label)
        for label in empty[:5]
    )
    raise UserError(
        f"{len(empty)} of {len(names)} classes have no sample: {listed}"
        f"{', …' if len(empty) > 5 else ''}.",
        remedy="Add samples of them, number the classes without gaps, or allow empty classes "
        "if this is meant to be a part of a larger data set.",
    )
