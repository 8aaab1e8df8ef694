"""One version of a memory, opened for reading: its live rows and their candidates."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnn2gnn_dist.data.index.class_matching import plain
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.search.knn import Index
from cnn2gnn_dist.inference.memory import rewiring, store
from cnn2gnn_dist.inference.memory.new_classes import NewClasses
from cnn2gnn_dist.inference.memory.old_classes import OldClasses
from cnn2gnn_dist.inference.memory.rewiring import Rewired
from cnn2gnn_dist.inference.memory.store import Version

SAME = 2e-3
"""Squared distance of x, relative to its mean squared distance from the mean, up to which two rows are one image.

x is computed in the precision of training where the graph is built, often bfloat16, and in float32 afterwards. Of
training images asked again in float32, this distance is at most 1.0e-3 (1,211 digits) and 2.2e-4 (4,000 of CIFAR-10);
from another image it is at least 8.8e-3 and 2.3e-2. (Distances of z overlap: up to 1.8e-3, and from 1.8e-3 on.)
"""
SAME_ADDED = 1e-6
"""The same for rows that were added later, in float32: what rounding to float16 may differ by. Images of a class that
the network has not learned may be alike to it."""
NEARER = 0.1
"""Part of the median distance to the other near rows up to which a row is the same image: where the network hardly
tells images of a class apart, ``SAME`` alone would take one for another."""
LIKELY = 16
"""Nearest rows among which an image is looked for."""
_SPREAD_ROWS = 10_000
_SAME_ROWS = 1024


class Memory:
    """The rows of a version; arrays are memory-mapped. Safe to use from several threads.

    Attributes:
        version: what was opened.
        classes: all class names; the first ``trained`` have a logit.
        labels: int32 [N], index into ``classes``.
        live: bool [N], False where a row was removed.
        added: bool [N], True where a row was added after the memory was created.
    """

    def __init__(self, root: Path, version: Version) -> None:
        self.root, self.version = root, version
        self._folders = [store.segment_folder(root, name) for name, _ in version.segments]
        self._starts = np.cumsum([0, *(rows for _, rows in version.segments)])
        self._x = [_mapped(folder / "x.npy") for folder in self._folders]
        self._z = [_mapped(folder / "z.npy") for folder in self._folders]
        # Mapped now: a compaction deletes these files, but this version is still read.
        self._rows = [_mapped_rows(folder / store.ROWS) for folder in self._folders]
        self.base_table = _mapped(self._folders[0] / "candidates.npy")
        self.classes = [entry.name for entry in version.classes]
        self.trained = sum(entry.trained for entry in version.classes)
        self.labels = np.concatenate([_read(folder / "labels.npy") for folder in self._folders])
        relabelled = self._array("relabelled", np.empty((0, 2), np.int64))
        self.labels[relabelled[:, 0]] = relabelled[:, 1]
        self.live = np.ones(len(self.labels), bool)
        self.live[self._array("removed", np.empty(0, np.int64))] = False
        self.added = np.arange(len(self.labels)) >= self._starts[1]
        self.added[self._array("added", np.empty(0, np.int64))] = True
        self.added |= self.labels >= self.trained  # an earlier version's compaction listed none
        self._changed = Rewired(
            self._array("changed", np.empty(0, np.int64)),
            self._array("changed_rows", np.empty((0, self.base_table.shape[1]), np.int32)),
        )

    @classmethod
    def open(
        cls,
        root: Path,
        number: int | None = None,
        check: Callable[[Path, Version], object] = lambda *_: None,
    ) -> Memory:
        """Open a version, by default the current one.

        Args:
            root: of the memory.
            number: of the version; None: the current one.
            check: called before its files are opened; raises UserError if they are damaged.

        Raises:
            UserError: it is missing or damaged.
        """  # noqa: DOC501
        while True:
            current = store.head(root) if number is None else number
            try:
                version = store.read_version(root, current)
                check(root, version)
                return cls(root, version)
            except (UserError, OSError):
                if number is not None or store.head(root) == current:
                    raise  # otherwise a compaction has replaced it while it was being opened

    def __len__(self) -> int:
        """The number of live rows."""
        return int(self.live.sum())

    @property
    def rows(self) -> int:
        """N: all rows, including removed ones."""
        return len(self.labels)

    @cached_property
    def live_ids(self) -> np.ndarray:
        """int64, the live rows."""
        return np.flatnonzero(self.live)

    def x(self, ids: np.ndarray) -> np.ndarray:
        """Features float16 [n, D] of rows."""
        return self._gather(self._x, ids)

    def z(self, ids: np.ndarray) -> np.ndarray:
        """Projections float32 [n, d] of rows, of unit length."""
        return self._gather(self._z, ids)

    def all_z(self) -> np.ndarray:
        """Projections of all N rows."""
        return self._z[0] if len(self._z) == 1 else np.concatenate(self._z)

    def candidates(self, ids: np.ndarray) -> np.ndarray:
        """int32 [n, M]: the candidates of live rows, nearest first; -1 = none."""
        return rewiring.candidates(self.base_table, self._changed, ids)

    def nearest(self, z_Bd: np.ndarray, count: int) -> np.ndarray:
        """int64 [B, count]: the nearest live rows; -1 where there are fewer. Ties by row."""
        index, ids, z_live = self._index
        return rewiring.nearest_of(index, z_live, ids, z_Bd, count)

    def same(self, x_BD: np.ndarray, rows_BF: np.ndarray) -> np.ndarray:
        """int64 [B]: which of these rows is the same image (``SAME``); -1 if none is.

        Args:
            x_BD: features of images.
            rows_BF: rows near each of them; -1 = none.
        """
        found_B = np.full(len(x_BD), -1, np.int64)
        if not (rows_BF >= 0).any():
            return found_B
        for start in range(0, len(x_BD), _SAME_ROWS):
            some = slice(start, start + _SAME_ROWS)
            found_B[some] = self._same(x_BD[some], rows_BF[some])
        return found_B

    def _same(self, x_BD: np.ndarray, rows_BF: np.ndarray) -> np.ndarray:
        x_BFD = self.x(rows_BF.clip(min=0).reshape(-1)).reshape(*rows_BF.shape, -1)
        # Rounded as rows are: an image that was added in this precision is at distance 0.
        x_B1D = np.asarray(x_BD, np.float16).astype(np.float64)[:, None]
        apart_BF = np.square(x_BFD.astype(np.float64) - x_B1D).sum(-1)
        apart_BF[rows_BF < 0] = np.inf
        place_B1 = apart_BF.argmin(1)[:, None]
        found_B: np.ndarray = np.take_along_axis(rows_BF, place_B1, 1)[:, 0]
        usual_B = _median_of_others(apart_BF)
        added = self._spread * SAME_ADDED
        most_B = np.maximum(np.minimum(self._spread * SAME, NEARER * usual_B), added)
        most_B = np.where(self.added[found_B], added, most_B)
        return np.where(np.take_along_axis(apart_BF, place_B1, 1)[:, 0] <= most_B, found_B, -1)

    def keys(self, ids: np.ndarray) -> list[str]:
        """The keys of rows."""
        # One by one: pa.array of an array of numpy's imports pandas, half a second at the first answer.
        return [str(self._keys[row]) for row in np.asarray(ids).tolist()]

    def ids_of(self, keys: list[str]) -> dict[str, int]:
        """The live row of each key; keys that no live row has are missing from the result."""
        import pyarrow.compute as pc  # takes an eighth of a second, and no answer needs it

        place = pc.index_in(pa.array(keys, pa.string()), value_set=self._live_keys)
        return {
            key: int(self.live_ids[row])
            for key, row in zip(keys, place.to_pylist(), strict=True)
            if row is not None
        }

    def sources(self, ids: np.ndarray) -> list[str]:
        """Where the images of rows came from."""
        return [str(one or "") for one in self._column("source").take(pa.array(ids)).to_pylist()]

    def thumbnails(self, ids: np.ndarray) -> list[bytes | None]:
        """The JPEGs of rows; None where there is none."""
        found = self._column("thumbnail").take(pa.array(ids)).to_pylist()
        return [None if one is None else one["bytes"] for one in found]

    def thumbnail(self, row: int) -> bytes | None:
        """The JPEG of a row; None if the memory has none of it."""
        found = self._cell(row, "thumbnail").as_py()
        return None if found is None else found["bytes"]

    def thumbnail_blocks(self, size: int) -> Iterator[list[bytes | None]]:
        """The JPEGs of all N rows, at most ``size`` at a time; each row group is read once."""
        for rows in self._rows:
            for batch in pq.ParquetFile(pa.BufferReader(rows)).iter_batches(
                size, columns=["thumbnail"]
            ):
                yield [cell and cell["bytes"] for cell in batch.column(0).to_pylist()]

    def counts(self) -> np.ndarray:
        """Live rows of each class, int64 [classes]."""
        return np.bincount(self.labels[self.live], minlength=len(self.classes))

    def class_named(self, name: str) -> str | None:
        """The name of a class as it is stored; None: there is none of this name in any spelling (``plain``)."""
        alike = [one for one in self.classes if plain(one) == plain(name)]
        return name if name in alike else alike[0] if alike else None

    def of_class(self, name: str) -> np.ndarray:
        """Bool [N]: rows of the class, or of all classes, with this name."""
        return np.isin(self.labels, [at for at, one in enumerate(self.classes) if one == name])

    @cached_property
    def new_classes(self) -> tuple[OldClasses, NewClasses] | None:
        """How new classes are scored alongside the old ones; None if there are none."""
        kept = self.version.heads
        if not kept:
            return None
        return OldClasses.from_json(kept["old"]), NewClasses.from_json(kept["new"])

    @cached_property
    def _spread(self) -> float:
        """Mean squared distance of x from its mean, over at most ``_SPREAD_ROWS`` rows, evenly spaced."""
        ids = self.live_ids[:: max(1, -(-len(self.live_ids) // _SPREAD_ROWS))]
        x_ND = self.x(ids).astype(np.float64)
        return float(np.square(x_ND - x_ND.mean(0)).sum(1).mean()) if len(ids) else 0.0

    @cached_property
    def _index(self) -> tuple[Index, np.ndarray, np.ndarray]:
        # Images that could not be read have z = 0 and are never neighbors.
        z_Nd = self.all_z()
        ids = self.live_ids[z_Nd[self.live_ids].any(1)]
        z_live = z_Nd if len(ids) == len(z_Nd) else np.ascontiguousarray(z_Nd[ids])
        return Index(z_live), ids, z_live

    @cached_property
    def _keys(self) -> pa.ChunkedArray:
        return self._column("key")

    @cached_property
    def _live_keys(self) -> pa.Array:
        return self._keys.take(pa.array(self.live_ids)).combine_chunks()

    def _column(self, name: str) -> pa.ChunkedArray:
        # pq.read_table would import pyarrow.dataset, and that pandas.
        files = [pq.ParquetFile(pa.BufferReader(rows)) for rows in self._rows]
        parts = [file.read(columns=[name])[name] for file in files]
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)

    def _cell(self, row: int, column: str) -> pa.Scalar:
        segment = int(np.searchsorted(self._starts, row, side="right")) - 1
        file = pq.ParquetFile(pa.BufferReader(self._rows[segment]))
        row -= int(self._starts[segment])
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if row < size:
                return file.read_row_group(group, columns=[column])[column][row]
            row -= size
        raise IndexError(row)

    def _gather(self, parts: list[np.ndarray], ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if len(parts) == 1:
            return parts[0][ids]
        found = np.empty((len(ids), parts[0].shape[1]), parts[0].dtype)
        segment = np.searchsorted(self._starts, ids, side="right") - 1
        for number, part in enumerate(parts):
            rows = segment == number
            found[rows] = part[ids[rows] - self._starts[number]]
        return found

    def _array(self, name: str, missing: np.ndarray) -> np.ndarray:
        if f"{name}.npy" not in self.version.files:
            return missing
        folder = store.version_folder(self.root, self.version.number)
        return _read(folder / f"{name}.npy")


def _read(path: Path) -> np.ndarray:
    return np.array(_mapped(path))


def _median_of_others(apart_BF: np.ndarray) -> np.ndarray:
    """Median of each row's finite values without the least one, [B]; infinite where there is no other."""
    others_BF = np.sort(apart_BF, axis=1)[:, 1:]
    count_B = np.isfinite(others_BF).sum(1)
    if not others_BF.shape[1]:
        return np.full(len(apart_BF), np.inf)
    middle_B = np.take_along_axis(
        others_BF, (count_B // 2).clip(max=others_BF.shape[1] - 1)[:, None], 1
    )
    return np.where(count_B > 0, middle_B[:, 0], np.inf)


def _mapped(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy parses the header as a Python literal: many types
        raise store.damaged(path, str(error)) from None
    return array


def _mapped_rows(path: Path) -> pa.Buffer:
    buffer = pa.memory_map(str(path)).read_buffer()
    try:
        pq.ParquetFile(pa.BufferReader(buffer))
    except (OSError, pa.ArrowException) as error:
        raise store.damaged(path, str(error)) from None
    return buffer


def forgotten(root: Path) -> list[str]:
    """Keys that were forgotten, which later trainings leave out."""
    try:
        with open(root / store.FORGOTTEN, encoding="utf-8", newline="") as file:
            return [line["key"] for line in csv.DictReader(file)]
    except FileNotFoundError:
        return []
