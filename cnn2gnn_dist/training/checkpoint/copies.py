"""Copies of complete checkpoints elsewhere, made in the background: when they begin, and when failures end a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives

_log = logging.getLogger(__name__)


class Copies(Protocol):
    """Where complete checkpoints are also kept; used on rank 0, while training goes on."""

    def start(self) -> str | None:
        """Begin to copy what is complete; return why that is not possible, if so."""

    def outcomes(self) -> list[str | None]:
        """Why copies failed (or None) that have ended since the last call, in order."""

    def wait(self) -> str | None:
        """Wait for all copies; return why the last one failed, if it did."""


@dataclass
class CopyCount:
    """The copies of one training, counted alike on all ranks.

    Attributes:
        copies: what makes them; None on all ranks, or on none.
        max_failures: how many in succession may fail; None: any number.
        waiting: whether this rank waits for the last copy.
    """

    copies: Copies | None
    max_failures: int | None
    waiting: bool = False
    _failures: int = 0

    def settle(self, complete: bool) -> None:
        """Copy what has become complete, and note how earlier copies have ended (collective).

        Raises:
            UserError: ``max_failures`` have failed in succession.
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
                    f"{self._failures} checkpoints in succession could not be copied: {problem}",
                    where="run.storage",
                    remedy="check the store and the network; the same command resumes from the last "
                    "checkpoint (checkpoint.max_failures)",
                )

    def wait(self) -> str:
        """Wait for all copies; what to add to a last word, empty if all is well (collective)."""
        self.waiting = self.copies is not None
        problem = None if self.copies is None else collectives.alone(self.copies.wait)
        return "" if problem is None else f", but not copied to run.storage: {problem}"
