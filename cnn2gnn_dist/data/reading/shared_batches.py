"""Batches in memory that two processes share: the layout, and buffers that leave nothing behind.

A buffer has no name in any file system: it is freed when the last process that maps it ends, in whatever way.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnn2gnn_dist.data.images.crops import Crops, view_numbers

MOST_LENT = 32
"""Maximum number of buffers lent to one actor, or kept of one stream's processes: each takes two open files here."""


class Layout:
    """Where the arrays of a batch are in a buffer; both processes compute the same layout.

    Args:
        groups: the requested views.
        rows: number of samples.
        view: the request's view number.

    Attributes:
        size: bytes of the batch.
    """

    def __init__(self, groups: Sequence[Crops], rows: int, view: int) -> None:
        self._rows, at = rows, 8 * rows
        self._images: list[tuple[int, tuple[int, ...]]] = []
        for group, numbers in zip(groups, view_numbers(groups, view), strict=True):
            side = group.views.size
            shape = (len(numbers), rows, side, side, 3)
            self._images.append((at, shape))
            at += int(np.prod(shape))
        self._valid = at
        self.size = at + rows

    def labels(self, memory: np.ndarray) -> np.ndarray:
        """Return labels int64 [n] over the buffer's bytes."""
        return memory[: 8 * self._rows].view(np.int64)

    def valid(self, memory: np.ndarray) -> np.ndarray:
        """Return the mask of samples that are not corrupt, bool [n], over the buffer's bytes."""
        return memory[self._valid : self._valid + self._rows].view(bool)

    def images(self, memory: np.ndarray) -> list[np.ndarray]:
        """Return each group's views, uint8 [V, n, size, size, 3], over the buffer's bytes."""
        return [memory[at : at + int(np.prod(shape))].reshape(shape) for at, shape in self._images]


def mapped(handle: int, size: int) -> np.ndarray:
    """Return a file's first bytes, uint8 [size], shared by all processes that map it."""
    return np.frombuffer(mmap.mmap(handle, size), np.uint8)


class Buffer:
    """Shared memory of one batch.

    Args:
        number: its number among the buffers of a stream.
        size: bytes.

    Attributes:
        handle: open file that another process can map.
        name: its name in ``/proc``, which no other buffer has.
        memory: its bytes.
    """

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.name = f"cnn2gnn-batch-{uuid.uuid4().hex}"
        self.handle = _unnamed_file(self.name, size)
        self.memory = mapped(self.handle, size)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


class Lease:
    """Memory of a batch, kept by its arrays.

    Views of views refer to this object itself, so that it lives as long as any of them.
    """

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self.__array_interface__: dict[str, Any] = buffer.memory.__array_interface__


class Spares:
    """Buffers for other batches: those that were given back, and those whose batches are gone.

    Looked for when one is needed. A ``__del__`` or a callback, which would tell when a batch is gone, runs in the
    midst of the loop over the batches, and Python drops an exception in it: once in some hundred times a Ctrl-C.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[weakref.ref[Lease] | None, Buffer]] = []

    def lease(self, buffer: Buffer) -> Lease:
        """Hand a buffer over to the arrays of a batch; when the last of them is gone, it is a spare one."""
        lease = Lease(buffer)
        self._kept.append((weakref.ref(lease), buffer))
        return lease

    def add(self, buffer: Buffer) -> None:
        """Give a buffer back."""
        self._kept.append((None, buffer))

    def pop(self) -> Buffer | None:
        """Take the one that was lent last, which is in the processor's cache; None if there is none."""
        for place in reversed(range(len(self._kept))):
            lease, buffer = self._kept[place]
            if lease is None or lease() is None:
                del self._kept[place]
                return buffer
        return None

    def in_use(self) -> int:
        """Number of buffers whose batches somebody still has."""
        return sum(lease is not None and lease() is not None for lease, _ in self._kept)

    def __len__(self) -> int:
        return len(self._kept) - self.in_use()


@dataclass(frozen=True)
class Loan:
    """Where another process of this host finds a buffer, and the names of all that may be lent to it again."""

    process: int
    handle: int
    name: str
    size: int
    kept: tuple[str, ...]


class Lender:
    """Buffers for one other process, which need not be a child; those whose batches are gone are reused."""

    def __init__(self) -> None:
        self.spares = Spares()
        self._all: weakref.WeakValueDictionary[str, Buffer] = weakref.WeakValueDictionary()

    def take(self, size: int) -> Buffer | None:
        """Return a free buffer that is large enough, or a new one; smaller ones are discarded.

        None: ``MOST_LENT`` are in use, because someone keeps their batches, or the system gives no more.
        """
        while (buffer := self.spares.pop()) is not None:
            if buffer.size >= size:
                return buffer
            del buffer
        if len(self._all) >= MOST_LENT:
            return None
        try:
            buffer = Buffer(0, size)
        except OSError:  # no open file left, or memory without a name is not allowed here
            return None
        self._all[buffer.name] = buffer
        return buffer

    def loan(self, buffer: Buffer) -> Loan:
        """Return what the other process needs to map a buffer."""
        return Loan(os.getpid(), buffer.handle, buffer.name, buffer.size, tuple(self._all))


class Borrower:
    """Buffers of another process, each mapped once."""

    def __init__(self) -> None:
        self._mapped: dict[str, np.ndarray] = {}

    def memory(self, loan: Loan) -> np.ndarray | None:
        """Return a buffer's bytes; None if it is not that of a process of this host, or may not be opened."""
        for name in self._mapped.keys() - set(loan.kept):
            del self._mapped[name]
        if loan.name not in self._mapped:
            memory = _opened(loan)
            if memory is None:
                return None
            self._mapped[loan.name] = memory
        return self._mapped[loan.name]


def _opened(loan: Loan) -> np.ndarray | None:
    path, wanted = f"/proc/{loan.process}/fd/{loan.handle}", f"/memfd:{loan.name} (deleted)"
    try:
        # On another host the same numbers may belong to anything: opening a pipe or a device has effects of its own.
        if os.readlink(path) != wanted:
            return None
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if os.readlink(f"/proc/self/fd/{handle}") != wanted:  # replaced in between
                return None
            return mapped(handle, loan.size)
        finally:
            os.close(handle)
    except OSError:
        return None


def _unnamed_file(name: str, size: int) -> int:
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create(name, os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, max(1, size))
    return handle
