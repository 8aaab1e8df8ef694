"""Units of a long computation, marked when done: what a kill leaves, and how ranks share.

A unit is a stretch of rows of one or more arrays on disk. Its mark, a file beside them, is written
when its rows are on disk, and holds their check sums. A unit belongs to a rank by its number
alone, and what it computes depends on nothing but its rows: any number of ranks, and any
interruption, end in the same arrays. When all are done, every rank compares what it reads with
the sums of those who wrote.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.row_file import RowFile, check_sum, read_rows

Shape = tuple[tuple[int, ...], type]


@dataclass(frozen=True)
class Crew:
    """Who works on a folder: this rank of ``world_size``, with ``threads``; how ranks wait.

    ``together``: while it lasts ranks work, however unevenly; all leave when all have.
    ``gather``: every rank's object, in rank order, on every rank (collective).
    ``progress``: told (phase, units done here, units here) after each unit.
    """

    rank: int = 0
    world_size: int = 1
    threads: int = 1
    together: Callable[[], AbstractContextManager[None]] = nullcontext
    gather: Callable[[Any], list[Any]] = lambda own: [own]
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None


class Workshop:
    """A folder of arrays and marks.

    Args:
        folder: made if missing; what a former attempt left in it is used.
        crew: the ranks that share it.
    """

    def __init__(self, folder: Path, crew: Crew) -> None:
        self.folder, self.crew = folder, crew
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, shape: tuple[int, ...], kind: type) -> RowFile:
        """An array on disk whose rows are to be written (collective): made if missing.

        Raises:
            UserError: the disk is full (on every rank).
        """
        path = self.path(name)
        with self.crew.together():
            if self.crew.rank == 0 and not path.exists():
                unfinished = path.with_suffix(".tmp")
                durable.reserve_array(unfinished, shape, kind)
                unfinished.replace(path)
        return RowFile(path)

    def path(self, name: str) -> Path:
        """Where an array lies."""
        return self.folder / f"{name}.npy"

    def fill(
        self,
        phase: str,
        units: Sequence[slice],
        arrays: Mapping[str, Shape],
        work: Callable[[slice], tuple[np.ndarray, ...]],
    ) -> tuple[np.ndarray, ...]:
        """Arrays whose rows ``work`` makes, unit by unit; mapped, read only (collective).

        Does this rank's units that have no mark yet and waits for the others.

        Args:
            phase: names the marks of what is done.
            units: stretches of rows that cover the arrays.
            arrays: shape and type by name.
            work: gives a unit's rows of each array, in their order.

        Raises:
            UserError: the disk is full, or a rank reads other rows than were written (on all).
        """
        crew = self.crew
        files = [self.file(name, *what) for name, what in arrays.items()]
        mine = range(crew.rank, len(units), crew.world_size)
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

        done = len(sums)
        with crew.together(), ThreadPoolExecutor(crew.threads, initializer=_one_thread) as pool:
            for unit, found in pool.map(one, left):
                sums[unit] = found
                done += 1
                crew.progress(phase, done, len(mine))
        for file in files:
            file.close()
        made = tuple(read_rows(self.path(name)) for name in arrays)
        everyone = {unit: s for part in crew.gather(sums) for unit, s in part.items()}
        others = set(range(len(units))) - set(left)
        strange = [
            unit
            for unit in sorted(others)
            if [check_sum(a[units[unit]]) for a in made] != everyone.get(unit)
        ]
        for unit in strange:
            self._mark(phase, unit).unlink(missing_ok=True)  # so that it is done again
        agree(crew, [f"{phase} {units[unit].start}..{units[unit].stop}" for unit in strange],
              self.folder)  # fmt: skip
        return made

    def _mark(self, phase: str, unit: int) -> Path:
        return self.folder / f"{phase}-{unit:05d}.done"

    def _sums(self, phase: str, unit: int) -> list[int] | None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return [int(s) for s in json.loads(self._mark(phase, unit).read_text("utf-8"))]
        return None


def agree(crew: Crew, strange: list[str], folder: Path) -> None:
    """See that no rank has read other rows than were written (collective).

    Args:
        crew: all ranks.
        strange: names of those that this rank has.
        folder: of the arrays, for the message.

    Raises:
        UserError: some rank has some, on every rank.
    """
    for rank, names in enumerate(crew.gather(strange)):
        if names:
            raise UserError(
                f"rank {rank} reads other rows than were written: {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
                where=str(folder),
                remedy="a run.dir in which every host sees at once what another has written; "
                "the same command makes these rows again",
            )


def spans(rows: int, size: int) -> list[slice]:
    """Rows cut into stretches of at most ``size``."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _one_thread() -> None:
    with contextlib.suppress(ImportError):  # a GPU's search needs no faiss
        import faiss

        faiss.omp_set_num_threads(1)  # OpenMP keeps this for each thread that calls it
