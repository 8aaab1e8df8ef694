"""Learning rate and weight averaging at a point of training, as configured. Pure."""

from __future__ import annotations

from cnn2gnn_dist.config_training import TrainConfig
from cnn2gnn_dist.training.schedule import kept_at, lr_at, peaked_lr_at


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
