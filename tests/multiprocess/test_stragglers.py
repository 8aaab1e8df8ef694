"""The time of a rank's own work is measured apart from the time that it waits for others."""

from __future__ import annotations

import hashlib
import time

import torch

from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages.shared import stragglers
from cnn2gnn_dist.stages.shared.tally import Tally
from tests.support import rank_group

WORK_S = 0.4
"""Processor time of one step of the slow rank."""


def steps(slow: int) -> list[float]:
    """The work time of all ranks in steps that end together; only one rank has anything to do.

    That is much more than a rank's waiting for a core adds up to when it wakes, which counts as its work, too.
    """
    tally, work = Tally(torch.device("cpu")), b"x" * 1_000_000
    for _ in range(4):
        end = time.thread_time() + WORK_S * (collectives.rank() == slow)
        while time.thread_time() < end:
            hashlib.sha256(work)
        collectives.barrier()
    return collectives.all_reduce_sum(torch.tensor(tally.own_work(), dtype=torch.float64)).tolist()


def test_the_rank_with_more_to_do_is_the_slowest() -> None:
    for slow in (0, 1):
        (seconds, others) = rank_group.run(steps, 2, slow)
        assert seconds == others
        rank, ratio = stragglers.slowest(seconds)
        assert rank == slow
        assert ratio > 1
