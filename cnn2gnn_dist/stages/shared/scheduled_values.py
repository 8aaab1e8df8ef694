"""Learning rate and weight averaging at a point of training, as configured. Pure."""

from __future__ import annotations

import math

from cnn2gnn_dist.config_training import TrainConfig
from cnn2gnn_dist.training.schedule import kept_at, lr_at, peaked_lr_at

SLOW_AVERAGE = 0.05
"""Share of the initial weights in the final average from which on it is worth a warning."""

SMALL_SHARE = 0.1
"""Share of the weights' movement, below which a lookahead that keeps no more of it is worth a warning."""


def rate_at(settings: TrainConfig, progress: float, warmup: float) -> float:
    """Learning rate after ``progress`` epochs; ``warmup``, in epochs, is that of the cosine schedule."""
    s = settings
    if s.schedule == "cosine":
        return lr_at(progress, s.epochs, s.lr, warmup)
    shape = (s.lr_start, s.lr_peak_at, s.lr_final)
    return peaked_lr_at(s.schedule, progress, s.epochs, s.lr, *shape)


def share_kept(settings: TrainConfig, progress: float, step: int) -> float | None:
    """Share of itself that the average of the weights keeps after a step; None: it is unchanged.

    ``progress``: epochs done; ``step``: optimizer steps done, this one included.
    """
    s = settings
    if s.average == "none" or step % s.average_every:
        return None
    return kept_at(progress / s.epochs, s.average_decay, s.average_every, s.average_ramp)


def slow_average(settings: TrainConfig, steps: int, late: int = 0) -> str | None:
    """One sentence if the average of a training of so many steps still holds much of the weights it began with.

    ``late``: steps before the graph's parameters start, of whose average that is said if it isn't of the others'.

    An average of ``average=ema`` starts as a copy of the initial weights, of which each update keeps a share. With
    ``average=lookahead`` training itself is slowed: each update sets the weights back by the share that it keeps.
    """
    s = settings
    if s.average == "lookahead":
        return _slow_lookahead(s)
    if s.average != "ema":
        return None
    what, kept = "the average of the weights", _initial_share(s, steps, 0)
    if kept < SLOW_AVERAGE and 0 < late < steps:
        what, kept = "the average of the graph's parameters", _initial_share(s, steps, late)
    if kept < SLOW_AVERAGE:
        return None
    return (
        f"after {steps} steps {kept:.0%} of {what}, which answers, will be the initial weights: a "
        "smaller average_decay or average_every, more epochs, or average_ramp above 0"
    )


def _initial_share(s: TrainConfig, steps: int, late: int) -> float:
    """The product of ``kept_at`` over the updates after ``late`` of so many steps."""
    last, before = steps // s.average_every, min(late, steps) // s.average_every
    if last == before:
        return 1.0
    if not s.average_decay:
        return 0.0
    updates = last - before  # at positions (before + 1)/last … 1
    ramp = math.lgamma(last + 1) - math.lgamma(before + 1) - updates * math.log(last)
    return math.exp(updates * s.average_every * math.log(s.average_decay) + s.average_ramp * ramp)


def _slow_lookahead(s: TrainConfig) -> str | None:
    kept = s.average_decay**s.average_every / (1 + s.average_ramp)  # the mean over training
    if 1 - kept >= SMALL_SHARE:
        return None
    half = 0.5 ** (1 / s.average_every)
    return (
        f"average=lookahead sets the weights back every {s.average_every} steps, and keeps {1 - kept:.1%} of what they "
        f"moved, as if lr were that much smaller: average_decay={half:.2f} keeps half of it, average_ramp above 0 more "
        "at first"
    )
