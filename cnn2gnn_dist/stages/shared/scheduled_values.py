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


def slow_average(settings: TrainConfig, steps: int) -> str | None:
    """One sentence if the average of a training of so many steps still holds much of the weights it began with.

    An average of ``average=ema`` starts as a copy of the initial weights, of which each update keeps a share. With
    ``average=lookahead`` training itself is slowed: each update sets the weights back by the share that it keeps.
    """
    s, updates = settings, steps // settings.average_every
    if s.average == "lookahead":
        return _slow_lookahead(s)
    if s.average != "ema":
        return None
    kept = 1.0
    if updates and not s.average_decay:
        kept = 0.0
    elif updates:  # the product of kept_at over positions 1/n, 2/n … 1
        ramp = s.average_ramp * (math.lgamma(updates + 1) - updates * math.log(updates))
        kept = math.exp(updates * s.average_every * math.log(s.average_decay) + ramp)
    if kept < SLOW_AVERAGE:
        return None
    return (
        f"after {steps} steps {kept:.0%} of the average of the weights, which answers, will be the initial weights: a "
        "smaller average_decay or average_every, more epochs, or average_ramp above 0"
    )


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
