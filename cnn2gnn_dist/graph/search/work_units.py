"""Units of a long computation, marked when done: resumable after a kill, and shared by ranks.

A unit is a range of rows of one or more arrays on disk. Its mark, a file next to them, is written
when its rows are on disk, and holds their checksums. The unit number alone determines the rank,
and a unit's result depends only on its rows: any number of ranks, and any interruption, give the
same arrays. When all units are done, every rank compares what it reads with the writers'
checksums.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.row_file import RowFile, check_sum, read_rows
from cnn2gnn_dist.runtime.shared_files.pieces import Piece

Shape = tuple[tuple[int, ...], type]


@dataclass(frozen=True)
class RankGroup:
    """The ranks that work on a folder: this one of ``world_size``, with ``threads``; how ranks wait.

    ``together``: a context in which ranks work, however unevenly; all leave when all are done.
    ``gather``: every rank's object, in rank order, on every rank (collective).
    ``progress``: called with (phase, units done here, units here) after each unit.
    ``forget``: called with the paths of arrays that all ranks have written, before they are read.
    ``creates``: whether this rank creates what all ranks fill: one does for each folder, if hosts don't share one.
    ``share``: called with what each rank has written, before it is read: hosts without a shared folder
    exchange it (collective).
    """

    rank: int = 0
    world_size: int = 1
    threads: int = 1
    together: Callable[[], AbstractContextManager[None]] = nullcontext
    gather: Callable[[Any], list[Any]] = lambda own: [own]
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None
    forget: Callable[[Iterable[Path]], None] = lambda paths: None
    creates: bool | None = None
    share: Callable[[Sequence[Piece]], None] = lambda pieces: None

    @property
    def is_creator(self) -> bool:
        """``creates``; rank 0 if that is not given."""
        return self.rank == 0 if self.creates is None else self.creates


class WorkFolder:
    """A folder of arrays and marks.

    Args:
        folder: created if missing; the results of an earlier attempt in it are reused.
        group: the ranks that share it.
    """

    def __init__(self, folder: Path, group: RankGroup) -> None:
        self.folder, self.group = folder, group
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, shape: tuple[int, ...], kind: type) -> RowFile:
        """Open an array on disk for writing rows (collective); created if missing.

        Raises:
            UserError: the disk is full (on every rank).
        """
        path = self.path(name)
        with self.group.together():
            if self.group.is_creator and not path.exists():
                unfinished = path.with_suffix(".tmp")
                durable.reserve_array(unfinished, shape, kind)
                unfinished.replace(path)
        return RowFile(path)

    def path(self, name: str) -> Path:
        """Path of an array."""
        return self.folder / f"{name}.npy"

    def discard(self, keep: str) -> None:
        """Remove the arrays and marks of an earlier attempt, except the array ``keep`` (collective)."""
        with self.group.together():
            if self.group.is_creator:
                for path in [*self.folder.glob("*.done"), *self.folder.glob("*.npy")]:
                    if path != self.path(keep):
                        path.unlink()

    def fill(
        self,
        phase: str,
        units: Sequence[slice],
        arrays: Mapping[str, Shape],
        work: Callable[[slice], tuple[np.ndarray, ...]],
    ) -> tuple[np.ndarray, ...]:
        """Return arrays whose rows ``work`` computes, unit by unit; memory-mapped, read-only (collective).

        Computes this rank's units that have no mark yet and waits for the others.

        Args:
            phase: names the marks of completed units.
            units: ranges of rows that cover the arrays.
            arrays: shape and type by name.
            work: returns a unit's rows of each array, in their order.

        Raises:
            UserError: the disk is full, or a rank reads other rows than were written (on all ranks).
        """
        group = self.group
        files = [self.file(name, *what) for name, what in arrays.items()]
        mine = range(group.rank, len(units), group.world_size)
        marked = {unit: self._sums(phase, unit) for unit in mine}
        sums = {unit: found for unit, found in marked.items() if found is not None}
        left = [unit for unit in mine if unit not in sums]

        def one(unit: int) -> tuple[int, list[int]]:
            rows, values = units[unit], work(units[unit])
            found = [f.write(rows.start, v) for f, v in zip(files, values, strict=True)]
            for file in files:
                file.sync()
            durable.write_text(self._mark(phase, unit), json.dumps(found))
            return unit, found

        with group.together(), ThreadPoolExecutor(group.threads, initializer=_one_thread) as pool:
            for unit, found in pool.map(one, left):
                sums[unit] = found
                group.progress(phase, len(sums), len(mine))
        for file in files:
            file.close()
        group.forget(self.path(name) for name in arrays)
        group.share([
            Piece(file.path, unit % group.world_size, (file.span(rows),))
            for file in files
            for unit, rows in enumerate(units)
        ])  # fmt: skip
        made = tuple(read_rows(self.path(name)) for name in arrays)
        everyone = {unit: s for part in group.gather(sums) for unit, s in part.items()}
        others = set(range(len(units))) - set(left)
        strange = [
            unit
            for unit in sorted(others)
            if [check_sum(a[units[unit]]) for a in made] != everyone.get(unit)
        ]
        for unit in strange:
            self._mark(phase, unit).unlink(missing_ok=True)  # so that it is recomputed
        check_agreement(group, [f"{phase} {units[unit].start}..{units[unit].stop}" for unit in strange],
              self.folder)  # fmt: skip
        return made

    def _mark(self, phase: str, unit: int) -> Path:
        return self.folder / f"{phase}-{unit:05d}.done"

    def _sums(self, phase: str, unit: int) -> list[int] | None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return [int(s) for s in json.loads(self._mark(phase, unit).read_text("utf-8"))]
        return None


def check_agreement(group: RankGroup, strange: list[str], folder: Path) -> None:
    """Check that every rank has read the rows that were written (collective).

    Args:
        group: all ranks.
        strange: names of the units whose rows differ on this rank.
        folder: of the arrays, for the message.

    Raises:
        UserError: some rank has such units (on every rank).
    """
    for rank, names in enumerate(group.gather(strange)):
        if names:
            raise UserError(
                f"rank {rank} reads rows that differ from those written: {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
                where=str(folder),
                remedy="use a run.dir where every host immediately sees what another has "
                "written; the same command recomputes these rows",
            )


def row_ranges(rows: int, size: int) -> list[slice]:
    """Split rows into ranges of at most ``size``."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _one_thread() -> None:
    with contextlib.suppress(ImportError):  # a GPU's search needs no faiss
        import faiss

        faiss.omp_set_num_threads(1)  # OpenMP stores this separately for each calling thread
