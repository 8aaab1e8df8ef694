"""Counts of a training between two log lines, kept on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages.shared.stragglers import own_seconds

OBSERVED = ("labelled_accuracy", "homophily", "median_scale", "degenerate_rows")
"""What may be observed in a micro-batch besides loss and accuracy: the same list on every rank, so that the ranks'
sums can be added whatever each of them has seen."""


class Tally:
    """Sums of one rank since the last log line, on the device: reading one waits for it.

    Attributes:
        sums: float64 [3]: loss, correct predictions, samples; summed as Python's floats would be.
        noted: float64 [observations, 2]: for each of ``OBSERVED`` its total, and over how many it was taken.
        began: start, by ``time.perf_counter``.
        waited: seconds spent waiting for data.
        worked: ``stragglers.own_seconds`` at the start.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.noted = torch.zeros(len(OBSERVED), 2, dtype=torch.float64, device=device)
        self.began = time.perf_counter()
        self.waited = 0.0
        self.worked = own_seconds()

    def add(self, loss: Tensor, right: Tensor, samples: Tensor) -> None:
        """Count a micro-batch: three scalars without gradients."""
        self.sums += torch.stack([loss.double(), right.double(), samples.double()])

    def note(self, name: str, total: Tensor, count: Tensor | None = None) -> None:
        """Record one of ``OBSERVED``, as a sum over ``count`` images; None: one value for the micro-batch.

        The next log line has the mean over all images (or micro-batches) of all ranks. A micro-batch in which there
        was nothing to observe has a count of 0, not a value of 0.
        """
        total = total.detach().double()
        count = torch.ones_like(total) if count is None else count.double()
        self.noted[OBSERVED.index(name)] += torch.stack([total, count])

    def own_work(self) -> list[float]:
        """Seconds that this rank did not spend on waiting for others, at its place among zeros for all ranks."""
        found = [0.0] * collectives.world_size()
        found[collectives.rank()] = own_seconds() - self.worked + self.waited
        return found

    def state(self) -> dict[str, Any]:
        """Return plain data, with elapsed seconds instead of a clock reading, which has no meaning elsewhere."""
        loss, right, samples, *noted = torch.cat([self.sums, self.noted.view(-1)]).tolist()
        return {
            "loss": loss,
            "right": right,
            "samples": samples,
            "began": time.perf_counter() - self.began,
            "waited": self.waited,
            "worked": own_seconds() - self.worked,
            "noted": dict(zip(OBSERVED, zip(noted[::2], noted[1::2], strict=True), strict=True)),
        }

    @classmethod
    def of(cls, states: list[dict[str, Any]], device: torch.device) -> Tally:
        """The sum of some ranks' tallies, to resume from."""
        tally = cls(device)
        tally.began -= max(state["began"] for state in states)
        tally.worked -= max(state.get("worked", 0.0) for state in states)
        for state in states:
            own = [state["loss"], state["right"], state["samples"]]
            tally.sums += torch.tensor(own, dtype=torch.float64, device=device)
            tally.waited += state["waited"]
            seen = state.get("noted", {})  # earlier versions kept lists, which are left out
            noted = [seen.get(name, (0.0, 0.0)) for name in OBSERVED]
            tally.noted += torch.tensor(noted, dtype=torch.float64, device=device)
        return tally


def means_of(noted: Sequence[float]) -> dict[str, float]:
    """The mean of each observation from ``noted``, row by row; those of which there was none are left out."""
    pairs = zip(OBSERVED, zip(noted[::2], noted[1::2], strict=True), strict=True)
    return {name: total / count for name, (total, count) in pairs if count}
