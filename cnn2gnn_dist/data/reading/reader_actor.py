"""The code of a reader actor, and the unpacking of its batches. Plain Python, wrapped by Ray."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.errors import UserError


class ReaderActor:
    """A reader in a separate process."""

    def __init__(self, spec: ReaderSpec) -> None:
        import torch

        torch.set_num_threads(1)
        self._spec = spec
        self._reader: Reader | None = None
        with contextlib.suppress(UserError):  # raising here would kill the actor
            self._reader = Reader(spec)

    def read(self, ids: np.ndarray, view: int) -> tuple[Any, ...]:
        """Return a batch as arrays and plain data; :func:`batch_of` makes a batch of it."""
        self._reader = self._reader or Reader(self._spec)
        batch = self._reader.read(Request(ids, view))
        images = batch.crops or (batch.images,)
        return images, bool(batch.crops), batch.labels, batch.ids, batch.valid, batch.problems, view

    def process_id(self) -> int:
        """Return the actor's process id; also serves as a liveness check."""
        return os.getpid()


def batch_of(arrays: tuple[Any, ...]) -> Batch:
    """Copy the result of ``ReaderActor.read`` into process memory."""
    images, several, labels, ids, valid, problems, view = arrays
    # Views of the object store pin it: copy once, then release it.
    made = tuple(image.copy() for image in images)
    first, crops = (made[0][0], made) if several else (made[0], ())
    return Batch(first, labels.copy(), ids.copy(), valid.copy(), problems, crops, view)
