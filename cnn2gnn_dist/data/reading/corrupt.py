"""Corrupt samples: each counts once, however often it is read, up to a limit."""

from __future__ import annotations

from dataclasses import dataclass, field

from cnn2gnn_dist.data.reading.reader import Batch


@dataclass
class CorruptSamples:
    """The corrupt samples of a set that were met so far.

    Attributes:
        limit: share of the set above which reading is to stop.
        total: samples of the set (a rank's share of one need not be whole).
        seen: what is wrong with each, by sample id, in the order in which they were met.
    """

    limit: float
    total: float
    seen: dict[int, str] = field(default_factory=dict)

    def note(self, batch: Batch) -> None:
        """Add a batch's corrupt samples; before padding is masked, which is not corrupt."""
        bad = (int(i) for i, ok in zip(batch.ids, batch.valid, strict=True) if not ok)
        for sample, problem in zip(bad, batch.problems, strict=False):
            self.seen.setdefault(sample, problem)

    def exceeds(self, count: int) -> bool:
        """Whether so many are more than the limit."""
        return count > self.limit * self.total
