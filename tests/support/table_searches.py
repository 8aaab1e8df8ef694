"""A search on ranks that synchronize through files."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.graph.search import approximate, work_units


def main(folder: Path, z_path: Path, rank: int, world_size: int, die_after: int) -> None:
    """Search as one rank, in a process that sends itself SIGKILL after ``die_after`` work units (0: never)."""
    for name in ("SCAN_ROWS", "JOIN_ROWS", "PROBE_ROWS"):
        setattr(approximate, name, 700)
    meetings = units_done = 0

    def gather(own: object) -> list[Any]:
        nonlocal meetings
        meetings += 1
        names = [folder / f"at-{meetings}-{r}" for r in range(world_size)]
        names[rank].with_suffix(".tmp").write_bytes(pickle.dumps(own))
        names[rank].with_suffix(".tmp").rename(names[rank])
        while not all(name.exists() for name in names):
            time.sleep(0.001)
        return [pickle.loads(name.read_bytes()) for name in names]

    @contextmanager
    def together() -> Iterator[None]:
        yield
        gather(None)

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal units_done
        units_done += 1
        if units_done == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    group = work_units.RankGroup(rank, world_size, 2, together, gather, progress)
    z_Nd = np.load(z_path, mmap_mode="r")
    search = approximate.TableSearch(work_units.WorkFolder(folder / "work", group), z_Nd, z_Nd, 12)
    found = search.build(approximate.RecallGoal(0.97))
    if rank == 0:
        np.save(folder / "table.npy", found.table_NM)
        np.save(folder / "order.npy", found.order_N)
        print(units_done, found.history[-1])
