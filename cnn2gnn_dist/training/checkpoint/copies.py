"""Copies of complete checkpoints elsewhere, made in the background: when they start, and when failures end a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.training.checkpoint.folder import File

_log = logging.getLogger(__name__)


class Copies(Protocol):
    """Where complete checkpoints are also kept; used on rank 0, while training continues."""

    def start(self) -> str | None:
        """Start to copy what is complete; return why that is impossible, if it is."""

    def outcomes(self) -> list[str | None]:
        """For each copy that has ended since the last call, in order: why it failed, or None."""

    def wait(self) -> str | None:
        """Wait for all copies; return why the last one failed, if it did."""

    def send(self, checkpoint: str, path: Path, file: File) -> None:
        """Copy a file of a checkpoint from a host that has a folder of its own; called in a thread."""

    def note_sent(self, checkpoint: str, files: Sequence[File]) -> None:
        """Record files of a complete checkpoint that other hosts have copied."""


@dataclass
class CopyCount:
    """The copies of one training, with the same counts on all ranks.

    Attributes:
        copies: what makes them; None on all ranks, or on none.
        max_failures: how many consecutive copies may fail; None: any number.
        waiting: whether this rank waits for the last copy.
    """

    copies: Copies | None
    max_failures: int | None
    waiting: bool = False
    _failures: int = 0

    def settle(self, complete: bool) -> None:
        """Copy what has become complete, and record the outcome of earlier copies (collective).

        Raises:
            UserError: ``max_failures`` consecutive copies have failed.
        """
        copies = self.copies
        if copies is None:
            return

        def begin() -> list[str | None]:
            refused = copies.start() if complete else None
            return copies.outcomes() + ([refused] if refused else [])

        for problem in collectives.alone(begin):
            self._failures = 0 if problem is None else self._failures + 1
            if problem is not None and collectives.rank() == 0:
                _log.error(
                    f"a checkpoint was written but not copied: {problem}; training continues, and the "
                    "next one is copied with what is missing"
                )
            if self.max_failures is not None and self._failures >= self.max_failures:
                raise UserError(
                    f"{self._failures} consecutive checkpoints could not be copied: {problem}",
                    where="run.storage",
                    remedy="check the store and the network; the same command resumes from the last "
                    "checkpoint (checkpoint.max_failures)",
                )

    def send(self, checkpoint: str, path: Path, file: File) -> None:
        """As ``Copies.send`` (any rank)."""
        assert self.copies is not None, "hosts without a shared folder have run.storage"
        self.copies.send(checkpoint, path, file)

    def note_sent(self, checkpoint: str, files: Sequence[File]) -> None:
        """As ``Copies.note_sent``, on rank 0."""
        if self.copies is not None and collectives.rank() == 0 and files:
            self.copies.note_sent(checkpoint, files)

    def wait(self) -> str:
        """Wait for all copies; return an addition to the final message, empty if all succeeded (collective)."""
        self.waiting = self.copies is not None
        problem = None if self.copies is None else collectives.alone(self.copies.wait)
        return "" if problem is None else f", but not copied to run.storage: {problem}"
