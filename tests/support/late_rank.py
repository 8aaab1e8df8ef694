"""The program on several ranks, the first of which is the last to notice an error of all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import psutil

from cnn2gnn_dist import launcher
from cnn2gnn_dist.runtime import preemption
from cnn2gnn_dist.runtime.group import exchange, members

AHEAD_S = 2.0
"""Seconds that the others are ahead, unless one of them has ended sooner."""


def main(arguments: list[str]) -> int:
    """A rank's part, for ``runs.launch_ranks``."""
    members.LINGER_S = exchange.WAIT_S = 100.0  # enough for a loaded machine
    if os.environ["RANK"] == "0":
        for module, name in ((members, "problem_of"), (preemption, "ignore_stop")):
            setattr(module, name, _late(getattr(module, name)))
    sys.argv = ["launch/train.py", *arguments]
    return launcher.main()


def _late(work: Callable[..., Any]) -> Callable[..., Any]:
    launched = psutil.Process(os.getppid())
    ranks = int(os.environ["WORLD_SIZE"])

    def late(*given: Any) -> Any:
        members.wait_until(lambda: len(launched.children()) < ranks, AHEAD_S)
        return work(*given)

    return late
