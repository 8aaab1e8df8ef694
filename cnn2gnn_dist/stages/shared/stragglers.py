"""Which rank the others wait for, found by the time that each rank's own work takes.

A step takes equally long on all ranks, because a collective ends only when the slowest rank has arrived. So each
rank counts the seconds for which it computed, waited for a core or waited for data; the rest of the time it waited
for others. On a GPU the host mostly waits for its device, so there only the host's busy time is compared.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn2gnn_dist.runtime.group import members

SLOW = 2.0
"""From this ratio on a rank is called slow."""
IN_SUCCESSION = 5
"""Consecutive log lines for which a rank is slow before the warning."""


def own_seconds() -> float:
    """Seconds for which this thread has computed, or waited for a core (where the kernel counts that)."""
    waited = 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.thread_time() + waited


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """The rank whose own work took longest, and how many times as long as the median of the others.

    Args:
        seconds: of own work by rank; at least two.
    """
    rank = int(np.argmax(seconds))
    others = float(np.median([one for other, one in enumerate(seconds) if other != rank]))
    return rank, seconds[rank] / max(others, 1e-9)


@dataclass
class Stragglers:
    """What one training's log says about slow ranks."""

    _rank: int = -1
    _lines: int = 0
    _said: bool = False

    def note(self, seconds: Sequence[float], warn: Callable[[str], None]) -> dict[str, float | str]:
        """What to log about ranks whose own work took these ``seconds`` since the last line.

        ``warn`` is called once, when a rank has been ``SLOW`` for ``IN_SUCCESSION`` lines.
        """
        if len(seconds) < 2:
            return {}
        rank, ratio = slowest(seconds)
        again = rank == self._rank and self._lines > 0
        self._rank, self._lines = rank, (self._lines * again + 1) * (ratio >= SLOW)
        if self._lines == IN_SUCCESSION and not self._said:
            self._said = True
            warn(
                f"{members.name_of(rank)} needs {ratio:.1f} times as long for its own work as the others, "
                "which wait for it: look for other processes, throttling or slow storage there"
            )
        there = members.present()
        host = {"slowest_host": there[rank].host} if rank < len(there) else {}
        return {"slowest": ratio, "slowest_rank": rank, **host}
