"""The model being served, and how another version of its memory replaces it.

A new version is loaded alongside the one being served, run once, and then swapped in: a batch sees one or the
other, and no request waits.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.inference.memory import store

_log = logging.getLogger(__name__)

T = TypeVar("T")

PINNED, UNPIN = "this server answers from one version of the memory", "unpin memory_version"


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
            UserError: as ``change`` raises it; the model has no memory, or is pinned.
        """
        with self._lock:
            if self.pinned:
                raise UserError(PINNED, remedy=UNPIN)
            beside = self._copy()
            made = change(beside)
            self._swap(beside)
            return made

    def follow(self) -> bool:
        """Load the current version from disk if another process has made one; True if it did.

        Raises:
            UserError: the memory is damaged, or the folder holds another model by now; the version
                before continues to answer.
        """
        current, memory = self._current, self._current.memory
        if memory is not None:
            artefact.check_unchanged(current.folder, current.identity)
        if memory is None or store.head(memory.root) == memory.version.number:
            return False
        with self._lock:
            if self.pinned:  # since a moment ago: ``use`` has had the lock, or is about to
                return False
            beside = self._copy()
            beside.reload()
            self._swap(beside)
        return True

    def use(self, number: int) -> None:
        """Load one version of the memory, current or not, and answer from it.

        Raises:
            UserError: there is no such version, or it is damaged.
        """
        with self._lock:
            beside = self._copy()
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
        self._current = beside
        _log.info("answering from version %s of the memory", self.version)
        self._swapped(beside)

    def _ask(self, model: Classifier) -> None:
        """Run a model once, so that what it builds on first use exists."""
        if model.spec.scope == "batch":
            return
        side = model.spec.views.size
        blank = Pixels("", np.zeros((side, side, 3), np.uint8))
        model.answers([blank], model.memory, top=1, neighbours=1)


def _number(model: Classifier) -> int | None:
    return None if model.memory is None else model.memory.version.number
