"""The model being served, and how another version of its memory replaces it.

A new version is loaded alongside the one being served, run once, and then swapped in: a batch sees one or the
other, and no request waits.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.inference.memory import store

_log = logging.getLogger(__name__)

T = TypeVar("T")

PINNED, UNPIN = "this server answers from one version of the memory", "unpin memory_version"


class _Mark(NamedTuple):
    """What tells a version from another one with its number.

    Attributes:
        file: number of its description on disk, time and length: while they stay, it is the same. None: unknown.
        digest: of its content (``store.digest``).
    """

    file: tuple[int, int, int] | None
    digest: str


class LiveModel:
    """A model with a memory that may change; safe to use from several threads.

    Args:
        model: opened; only copies of it are changed.
        swapped: called with the model, and after every swap with the new one.

    Attributes:
        pinned: whether to answer from the version of ``use`` only: nothing is edited or followed.
    """

    def __init__(
        self, model: Classifier, swapped: Callable[[Classifier], None] = lambda _: None
    ) -> None:
        self._current, self._swapped = model, swapped
        self.pinned = False
        self._lock = threading.Lock()  # held while the next one is made
        self._ask(model)
        self._mark = _mark_of(model)
        swapped(model)

    @property
    def current(self) -> Classifier:
        """The model being served; its memory doesn't change."""
        return self._current

    @property
    def version(self) -> int | None:
        """Number of the memory's version; None without a memory."""
        return _number(self._current)

    def edit(self, change: Callable[[Classifier], T]) -> T:
        """Edit the memory on disk and answer from the result.

        Args:
            change: given a copy of the model, whose memory it edits and reloads (as ``editing`` does).

        Raises:
            UserError: as ``change`` raises it; the model has no memory, or is pinned; the folder holds
                another memory by now.
        """
        with self._lock:
            if self.pinned:
                raise UserError(PINNED, remedy=UNPIN)
            beside = self._copy()
            self._check_version()
            made = change(beside)
            self._swap(beside)
            return made

    def follow(self) -> bool:
        """Load the current version from disk if another process has made one; True if it did.

        Raises:
            UserError: the memory is damaged, or the folder holds another model or memory by now; the
                version before continues to answer.
        """
        if self._current.memory is None:
            return False
        with self._lock:
            current, memory = self._current, self._current.memory
            artefact.check_unchanged(current.folder, current.identity)
            self._check_version()
            if store.head(memory.root) == memory.version.number:
                return False
            if self.pinned:  # since a moment ago: ``use`` has had the lock, or is about to
                return False
            beside = self._copy()
            beside.reload()
            self._swap(beside)
        return True

    def use(self, number: int) -> None:
        """Load one version of the memory, current or not, and answer from it.

        Raises:
            UserError: there is no such version, or it is damaged; the folder holds another memory by now.
        """
        with self._lock:
            beside = self._copy()
            self._check_version()
            assert beside.memory is not None
            if beside.memory.version.number != number:
                beside.use_version(number)
                self._swap(beside)

    def _copy(self) -> Classifier:
        if self._current.memory is None:
            raise UserError(
                "this model has no memory: it was trained without a graph of the data set",
                remedy="serve a model that was exported from a run with graph.scope=dataset",
            )
        return copy.copy(self._current)

    def _swap(self, beside: Classifier) -> None:
        if _number(beside) == _number(self._current):
            return
        self._ask(beside)
        self._current, self._mark = beside, _mark_of(beside)
        _log.info("answering from version %s of the memory", self.version)
        self._swapped(beside)

    def _check_version(self) -> None:
        """Check that the version being served is the one that has its number on disk.

        One that is no longer there was compacted, if the current one has its mark: that one is followed.

        Raises:
            UserError: the memory is another one, such as that of a copy of this model; or damaged.
        """
        memory, mark = self._current.memory, self._mark
        if memory is None or mark is None:
            return
        number = memory.version.number
        try:
            file = _file_of(memory.root, number)
            if file is not None and file == mark.file:
                return
            digest = store.digest(memory.root, store.read_version(memory.root, number))
        except UserError:
            if store.version_folder(memory.root, number).is_dir():
                raise
            self._check_compacted(memory.root, number, mark)
            return
        if digest != mark.digest:
            raise self._another(f"the version {number} of its memory is another one")
        self._mark = _Mark(file, digest)  # a copy with the same content

    def _check_compacted(self, root: Path, number: int, mark: _Mark) -> None:
        """Check that the memory on disk, which no longer has the version being served, was made from it.

        Raises:
            UserError: it is another one; or damaged.
        """
        current = store.current_version(root)
        if current.number < number:  # compacting and forgetting count on
            raise self._another(f"its memory has no version {number} yet")
        # None: an earlier version of this package compacted it, and left no marks.
        if current.dropped is not None and store.mark(mark.digest) not in current.dropped:
            raise self._another(f"its memory never was the version {number} being served")

    def _another(self, why: str) -> UserError:
        return UserError(
            f"another model has taken the place of this one since it was opened: {why}",
            where=str(self._current.folder),
            remedy="restart the server; give a new model a folder of its own",
        )

    def _ask(self, model: Classifier) -> None:
        """Run a model once, so that what it builds on first use exists."""
        if model.spec.scope == "batch":
            return
        side = model.spec.views.size
        blank = Pixels("", np.zeros((side, side, 3), np.uint8))
        model.answers([blank], model.memory, top=1, neighbours=1)


def _number(model: Classifier) -> int | None:
    return None if model.memory is None else model.memory.version.number


def _mark_of(model: Classifier) -> _Mark | None:
    """None: there is no memory, or the version was compacted a moment ago."""
    memory = model.memory
    if memory is None:
        return None
    file = _file_of(memory.root, memory.version.number)
    try:
        return _Mark(file, store.digest(memory.root, memory.version))
    except UserError:
        return None


def _file_of(root: Path, number: int) -> tuple[int, int, int] | None:
    try:
        about = os.stat(store.version_folder(root, number) / "version.json")
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size
