"""Units of a long computation, marked when done: what a kill leaves, and how ranks share.

A mark is an empty file beside the arrays that the units fill. A unit belongs to a rank by its
number alone, and what it computes depends on nothing but its number: any number of ranks, and
any interruption, end in the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn2gnn_dist import durable


@dataclass(frozen=True)
class Crew:
    """Who works on a folder: this rank of ``world_size``, with ``threads``; how ranks wait.

    ``progress``: told (phase, units done here, units here) after each unit.
    """

    rank: int = 0
    world_size: int = 1
    threads: int = 1
    barrier: Callable[[], None] = lambda: None
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

    def array(self, name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
        """An array on disk that all ranks fill (collective): made if missing.

        Raises:
            UserError: the disk is full.
        """
        path = self.folder / f"{name}.npy"
        if self.crew.rank == 0 and not path.exists():
            unfinished = path.with_suffix(".tmp")
            durable.reserve_array(unfinished, shape, kind)
            unfinished.replace(path)
        self.crew.barrier()
        return np.load(path, mmap_mode="r+")

    def phase(self, name: str, units: int, work: Callable[[int], None]) -> None:
        """Do this rank's units that have no mark yet, then wait for the others (collective)."""
        mine = range(self.crew.rank, units, self.crew.world_size)
        left = [unit for unit in mine if not self._mark(name, unit).exists()]

        def one(unit: int) -> None:
            work(unit)
            self._mark(name, unit).touch()

        done = len(mine) - len(left)
        with ThreadPoolExecutor(self.crew.threads, initializer=_one_thread_each) as pool:
            for _ in pool.map(one, left):
                done += 1
                self.crew.progress(name, done, len(mine))
        self.crew.barrier()

    def _mark(self, name: str, unit: int) -> Path:
        return self.folder / f"{name}-{unit:05d}.done"


def spans(rows: int, size: int) -> list[slice]:
    """Rows cut into stretches of at most ``size``."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _one_thread_each() -> None:
    import faiss

    faiss.omp_set_num_threads(1)  # OpenMP keeps this for each thread that calls it
