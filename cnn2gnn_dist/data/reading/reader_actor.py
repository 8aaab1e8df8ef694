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
        """Return a batch as arrays (images, labels, ids, valid) and its problems."""
        self._reader = self._reader or Reader(self._spec)
        batch = self._reader.read(Request(ids, view))
        return batch.images, batch.labels, batch.ids, batch.valid, batch.problems

    def process_id(self) -> int:
        """Return the actor's process id; also serves as a liveness check."""
        return os.getpid()


def batch_of(arrays: tuple[Any, ...]) -> Batch:
    """Copy the result of ``ReaderActor.read`` into process memory."""
    images, labels, ids, valid, problems = arrays
    # Views of the object store pin it: copy once, then release it.
    return Batch(images.copy(), labels.copy(), ids.copy(), valid.copy(), problems)
