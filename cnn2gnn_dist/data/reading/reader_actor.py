"""The code of a reader actor, and the unpacking of its batches. Plain Python, wrapped by Ray.

An actor on the host of its trainer writes pixels into memory of the trainer; on another host they pass through Ray's
object store.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from cnn2gnn_dist.data.images.crops import crops_of
from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request, use_one_thread
from cnn2gnn_dist.data.reading.shared_batches import Borrower, Layout, Loan
from cnn2gnn_dist.errors import UserError


class ReaderActor:
    """A reader in a separate process."""

    def __init__(self, spec: ReaderSpec) -> None:
        use_one_thread()
        self._spec = spec
        self._borrowed = Borrower()
        self._reader: Reader | None = None
        with contextlib.suppress(UserError):  # raising here would kill the actor
            self._reader = Reader(spec)

    def read(self, ids: np.ndarray, view: int, loan: Loan | None = None) -> tuple[Any, ...]:
        """Return a batch as arrays and plain data; :func:`batch_of` makes a batch of it.

        Args:
            ids: samples.
            view: view number.
            loan: memory of the trainer. Pixels are written there, and left out of the result, if it can be mapped.
        """
        self._reader = self._reader or Reader(self._spec)
        memory = None if loan is None else self._borrowed.memory(loan)
        layout = Layout(crops_of(self._spec.views), len(ids), view)
        into = None if memory is None else layout.images(memory)
        batch = self._reader.read(Request(ids, view), into)
        images = (batch.crops or (batch.images,)) if into is None else None
        return images, bool(batch.crops), batch.labels, batch.ids, batch.valid, batch.problems, view

    def process_id(self) -> int:
        """Return the actor's process id; also serves as a liveness check."""
        return os.getpid()


def batch_of(arrays: tuple[Any, ...], shared: list[np.ndarray] | None = None) -> Batch:
    """Make a batch of the result of ``ReaderActor.read``.

    Args:
        arrays: the result.
        shared: each group's views in lent memory, if the result has no pixels; they are not copied.
    """
    images, several, labels, ids, valid, problems, view = arrays
    if images is None:
        assert shared is not None
        made = tuple(shared) if several else (shared[0][0],)
    else:
        # Views of the object store pin it: copy once, then release it.
        made = tuple(image.copy() for image in images)
    first, crops = (made[0][0], made) if several else (made[0], ())
    return Batch(first, labels.copy(), ids.copy(), valid.copy(), problems, crops, view)
