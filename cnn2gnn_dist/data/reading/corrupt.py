"""Count of corrupt samples, each once however often it is read, with a limit."""

from __future__ import annotations

from dataclasses import dataclass, field

from cnn2gnn_dist.data.reading.reader import Batch


@dataclass
class CorruptSamples:
    """The corrupt samples of a data set found so far.

    Attributes:
        limit: fraction of the data set above which reading should stop.
        total: number of samples in the data set (a rank's share need not be an integer).
        seen: sample id → what is wrong with it, in the order found.
    """

    limit: float
    total: float
    seen: dict[int, str] = field(default_factory=dict)

    def note(self, batch: Batch) -> None:
        """Add a batch's corrupt samples. Call this before masking padding, which is not corrupt."""
        bad = (int(i) for i, ok in zip(batch.ids, batch.valid, strict=True) if not ok)
        for sample, problem in zip(bad, batch.problems, strict=False):
            self.seen.setdefault(sample, problem)

    def exceeds(self, count: int) -> bool:
        """Return whether ``count`` corrupt samples exceed the limit."""
        return count > self.limit * self.total
