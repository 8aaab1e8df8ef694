"""Counts of a training between two log lines, kept on the device."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages.shared.stragglers import own_seconds


class Tally:
    """Sums of one rank since the last log line, on the device: reading one waits for it.

    Attributes:
        sums: float64 [3]: loss, correct predictions, samples; summed as Python's floats would be.
        began: start, by ``time.perf_counter``.
        waited: seconds spent waiting for data.
        worked: ``stragglers.own_seconds`` at the start.
        extra: observations by name, each a scalar tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.began = time.perf_counter()
        self.waited = 0.0
        self.worked = own_seconds()
        self.extra: dict[str, list[Tensor]] = {}

    def add(self, loss: Tensor, right: Tensor, samples: Tensor) -> None:
        """Count a micro-batch: three scalars without gradients."""
        self.sums += torch.stack([loss.double(), right.double(), samples.double()])

    def note(self, name: str, value: Tensor) -> None:
        """Record one observation (a scalar), averaged in the next log line."""
        self.extra.setdefault(name, []).append(value.detach())

    def observed(self) -> dict[str, list[float]]:
        """Observations by name (waits for the device, once)."""
        flat = [value.double() for seen in self.extra.values() for value in seen]
        values = iter(torch.stack(flat).tolist() if flat else [])
        return {name: [next(values) for _ in seen] for name, seen in self.extra.items()}

    def own_work(self) -> list[float]:
        """Seconds that this rank did not spend on waiting for others, at its place among zeros for all ranks."""
        found = [0.0] * collectives.world_size()
        found[collectives.rank()] = own_seconds() - self.worked + self.waited
        return found

    def state(self) -> dict[str, Any]:
        """Return plain data, with elapsed seconds instead of a clock reading, which has no meaning elsewhere."""
        loss, right, samples = self.sums.tolist()
        return {
            "loss": loss,
            "right": right,
            "samples": samples,
            "began": time.perf_counter() - self.began,
            "waited": self.waited,
            "worked": own_seconds() - self.worked,
            "extra": self.observed(),
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
            for name, seen in state["extra"].items():
                values = torch.tensor(seen, dtype=torch.float64, device=device)
                tally.extra.setdefault(name, []).extend(values.unbind())
        return tally
