"""What runs inside a reader actor, and the way of a batch out of it. Plain Python: Ray wraps it."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.errors import UserError


class ReaderActor:
    """A reader in a process of its own."""

    def __init__(self, spec: ReaderSpec) -> None:
        import torch

        torch.set_num_threads(1)
        self._spec = spec
        self._reader: Reader | None = None
        with contextlib.suppress(UserError):  # here it would be the actor's death
            self._reader = Reader(spec)

    def read(self, ids: np.ndarray, view: int) -> tuple[Any, ...]:
        """A batch as arrays: images, labels, ids, valid; and its problems."""
        self._reader = self._reader or Reader(self._spec)
        batch = self._reader.read(Request(ids, view))
        return batch.images, batch.labels, batch.ids, batch.valid, batch.problems

    def process_id(self) -> int:
        """Of the actor's process; also how it is asked whether it is there."""
        return os.getpid()


def batch_of(arrays: tuple[Any, ...]) -> Batch:
    """What ``ReaderActor.read`` returned, in memory of one's own."""
    images, labels, ids, valid, problems = arrays
    # Views of the object store pin it: copy once, then let go.
    return Batch(images.copy(), labels.copy(), ids.copy(), valid.copy(), problems)
