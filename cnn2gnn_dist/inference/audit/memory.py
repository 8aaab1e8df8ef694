"""A model's memory as a training set to audit: its rows, and the thumbnails of their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cnn2gnn_dist.data.images.decode import decode
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, render
from cnn2gnn_dist.graph import duplicates
from cnn2gnn_dist.inference.audit import look_alike
from cnn2gnn_dist.inference.audit.findings import TrainingSet
from cnn2gnn_dist.inference.memory.view import Memory

READ = 256
"""Thumbnails read at a time."""


def training_set(memory: Memory) -> TrainingSet:
    """The live rows of a memory, renumbered without the removed ones."""
    ids = memory.live_ids
    new_N = np.full(memory.rows + 1, -1, np.int32)  # the last entry is for -1
    new_N[ids] = np.arange(len(ids), dtype=np.int32)
    x_ND = memory.x(ids)
    return TrainingSet(
        x_ND,
        memory.z(ids),
        memory.labels[ids],
        new_N[memory.candidates(ids)],
        duplicates.groups(duplicates.row_keys(np.ascontiguousarray(x_ND))),
        memory.classes,
    )


class Thumbnails:
    """Thumbnails of the live rows of a memory, numbered as in ``training_set``."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return any(data is not None for data in next(self.blocks(READ), []))

    def jpegs(self, rows: Sequence[int]) -> list[bytes | None]:
        """Encoded pictures of rows; None where there is none."""
        ids = self.memory.live_ids
        return [self.memory.thumbnail(int(ids[row])) for row in rows]

    def look(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, 32, 32, 3] of distinct rows; black where there is none."""
        views = ViewSpec(kind="none", size=look_alike.SIDE, flip=False)
        found = np.zeros((len(rows), look_alike.SIDE, look_alike.SIDE, 3), np.uint8)
        wanted = {int(row): place for place, row in enumerate(rows)}
        start = 0
        for block in self.blocks(READ):
            for row in range(start, start + len(block)):
                data = block[row - start]
                if row in wanted and data is not None:
                    found[wanted[row]] = render(views, decode(data), 0, CLEAN)
            start += len(block)
        return found

    def blocks(self, size: int) -> Iterator[list[bytes | None]]:
        """All of them, in blocks. Each row group is read once, in order, not once per row."""
        held: list[bytes | None] = []
        start = 0
        for cells in self.memory.thumbnail_blocks(size):
            live = self.memory.live[start : start + len(cells)]
            held += [cell for cell, good in zip(cells, live, strict=True) if good]
            start += len(cells)
            while len(held) >= size:
                yield held[:size]
                held = held[size:]
        if held:
            yield held
