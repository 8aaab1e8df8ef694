"""The rows that ranks embed for a graph version: written, recorded, and read back by other ranks."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.order import sequential
from cnn2gnn_dist.graph.row_file import RowFile, check_sum, read_rows
from cnn2gnn_dist.graph.search.work_units import WorkFolder, check_agreement
from cnn2gnn_dist.graph.version import GraphWriter
from cnn2gnn_dist.runtime.shared_files.pieces import Piece

NOTE = 16
"""Batches per chunk: after each chunk a rank records its progress."""


class Embedded:
    """x, z and the query side of this rank's images, in chunks of ``NOTE`` batches (collective).

    A chunk is recorded with its checksums when its rows are on disk. At the end each rank
    compares what it reads with the writers' checksums.

    Args:
        writer: has the arrays ``x`` and ``z``.
        work_folder: where the records are stored.
        samples, batch: of the plan (``order.sequential``).
        query_dim: columns of the query side; 0: there is none.
    """

    def __init__(
        self, writer: GraphWriter, work_folder: WorkFolder, samples: int, batch: int, query_dim: int
    ) -> None:
        self.writer, self.work_folder, self.samples, self.batch = (
            writer,
            work_folder,
            samples,
            batch,
        )
        self.query: RowFile | None = None
        if query_dim:
            self.query = work_folder.file("query", (samples, query_dim), np.float32)
        self._path = work_folder.folder / f"embedded-{work_folder.group.rank}"
        self._notes = _read(self._path)
        # Every rank takes the same number of steps: a ZeRO-3 forward pass is collective.
        self._former = min(work_folder.group.gather(len(self._notes)))
        self._notes = self._notes[: self._former]
        self._sums: dict[str, int] = {}
        if self._former * NOTE < len(self._plan(work_folder.group.rank)):
            # Where hosts don't share a folder, one may have lost its own during the search. Images that are
            # embedded again may get other rows, with which no result of the others' search goes together.
            work_folder.discard(keep="query")

    @property
    def batches_done(self) -> int:
        """Number of batches per rank that an earlier attempt completed."""
        return min(self._former * NOTE, len(self._plan(self.work_folder.group.rank)))

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write rows ``start`` … of ``x``, ``z`` or ``query``."""
        before = self._sums.get(name, 0)
        if name == "query":
            assert self.query is not None
            self._sums[name] = self.query.write(start, values, before)
        else:
            self._sums[name] = self.writer.rows(name, start, values, before)

    def note(self) -> None:
        """Sync the chunk just written, then record it."""
        self.writer.sync()
        if self.query is not None:
            self.query.sync()
        self._notes.append(self._sums)
        self._sums = {}
        durable.write_text(self._path, json.dumps(self._notes))

    def close(self) -> None:
        """Wait for the others and compare checksums.

        Raises:
            UserError: a rank reads other rows than were written (on every rank).
        """
        group = self.work_folder.group
        if self.query is not None:
            self.query.close()
        everyone = group.gather(self._notes)
        group.forget([self._array_path(name) for name in ("x", "z")])
        if self.query is not None:
            group.forget([self._array_path("query")])
        group.share(self._pieces(everyone))
        mismatches = []
        for rank, notes in enumerate(everyone):
            mine, plan = rank == group.rank, self._plan(rank)
            last = self._former if mine else len(notes)  # this process wrote the rest of mine
            for number, sums in enumerate(notes[:last]):
                batches = plan[number * NOTE : (number + 1) * NOTE]
                if self._read_back(batches, sums) != sums:
                    mismatches.append(f"embedded rows of rank {rank}, chunk {number}")
        if mismatches:
            self._path.unlink(missing_ok=True)
        check_agreement(group, mismatches, self.writer.path)

    def _pieces(self, everyone: list[list[dict[str, int]]]) -> list[Piece]:
        """What each rank has written: of each array its rows in each chunk."""
        found = []
        for name in ("x", "z", "query") if self.query is not None else ("x", "z"):
            with RowFile(self._array_path(name)) as file:
                for rank, notes in enumerate(everyone):
                    plan = self._plan(rank)
                    for number in range(len(notes)):
                        batches = plan[number * NOTE : (number + 1) * NOTE]
                        spans = tuple(
                            file.span(slice(int(ids[0]), int(ids[0]) + int(mask.sum())))
                            for ids, mask in batches
                            if mask.any()
                        )
                        found.append(Piece(file.path, rank, spans))
        return found

    def _read_back(
        self, batches: list[tuple[np.ndarray, np.ndarray]], sums: dict[str, int]
    ) -> dict[str, int]:
        """Checksums of a chunk as this rank reads it; x only where all of it is needed."""
        found = {}
        for name, known in sums.items():
            if name == "x" and self.work_folder.group.rank:
                found[name] = known  # rank 0 reads all of x, other ranks only their partitions
                continue
            rows = self.array(name)
            total = 0
            for ids, mask in batches:
                if mask.any():
                    total = check_sum(rows[ids[0] : ids[0] + int(mask.sum())], total)
            found[name] = total
        return found

    def array(self, name: str) -> np.ndarray:
        """Map all rows of an array again."""
        return read_rows(self._array_path(name))

    def _array_path(self, name: str) -> Path:
        if name == "query":
            return self.work_folder.path(name)
        return self.writer.array_path(name)

    def _plan(self, rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(sequential(self.samples, self.batch, rank, self.work_folder.group.world_size))


def _read(path: Path) -> list[dict[str, int]]:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        notes = json.loads(path.read_text(encoding="utf-8"))
        return [{str(name): int(s) for name, s in note.items()} for note in notes]
    return []
