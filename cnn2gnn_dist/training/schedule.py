"""Learning rate over training: warm-up and cosine, a triangle, one cycle; also for parameters that start late."""

from __future__ import annotations

import math


def lr_at(step: float, total: float, peak: float, warmup: float, final: float = 0.0) -> float:
    """Learning rate at ``step`` of ``total``, both in the same unit (steps or epochs).

    Rises from 0 to ``peak`` over ``warmup``, then falls to ``final`` on a cosine
    (Loshchilov & Hutter, "SGDR", ICLR 2017, equation 5, a single period).
    """
    if step < warmup:
        return peak * step / warmup
    share = min(1.0, (step - warmup) / max(total - warmup, 1e-12))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


SHARES = {"triangular": (0.2, 0.23, 0.07), "one_cycle": (0.04, 0.3, 4e-6)}
"""For the schedules with a peak within training, in the order start, peak, end: the rate at the start as a
share of the peak, the peak's position as a share of training, the rate at the end as a share of the peak.
airbench's values, and those of torch's OneCycleLR."""


def peaked_lr_at(
    kind: str,
    step: float,
    total: float,
    peak: float,
    start: float | None = None,
    peak_at: float | None = None,
    final: float | None = None,
) -> float:
    """Learning rate at ``step`` of ``total`` that rises to ``peak`` and falls again.

    Args:
        kind: ``triangular``: two lines; ``one_cycle``: two half cosines (Smith and Topin, 2018; of T steps
            torch's OneCycleLR has its last at T-1 and its peak one step early: ``total=T-1``).
        step: steps or epochs done.
        total: in the same unit.
        peak: the largest rate.
        start: rate at 0, as a share of the peak; None: the kind's (``SHARES``).
        peak_at: where the peak is, as a share of ``total``.
        final: rate at the end, as a share of the peak.
    """
    first, top, last = SHARES[kind]
    first, top = (first if start is None else start), (top if peak_at is None else peak_at)
    last, position = (last if final is None else final), min(1.0, step / total)
    rising = position < top
    low, share = (first, position / top) if rising else (last, (1 - position) / max(1 - top, 1e-12))
    if kind == "one_cycle":
        share = 0.5 * (1 - math.cos(math.pi * share))
    return peak * (low + (1 - low) * share)


def size_at(epoch: int, epochs: int, size: int, early_size: int | None, early_share: float) -> int:
    """Side of the images of an epoch (counted from 0): small ones first, as they cost less."""
    early = early_size is not None and epoch < round(early_share * epochs)
    return early_size if early and early_size is not None else size


def late_share(step: float, start: float, late_warmup: float) -> float:
    """Share of the ordinary rate, rising linearly from 0, for parameters whose first gradients arrive at ``start``."""
    if step < start:
        return 0.0
    return min(1.0, (step - start) / late_warmup) if late_warmup else 1.0


def kept_at(position: float, decay: float, every: int, ramp: float) -> float:
    """Share of itself that an average of the weights, updated every ``every`` steps, keeps at an update.

    ``decay`` ^ ``every``, times ``position`` ^ ``ramp``: with a ramp, an average near the start of training
    (``position`` 0 to 1) follows the weights closely.
    """
    return decay**every * position**ramp


def late_lr_at(
    step: float, total: float, peak: float, warmup: float, start: float, late_warmup: float
) -> float:
    """Learning rate of parameters whose first gradients arrive at ``start``.

    The other parameters' rate, times a linear ramp from 0 over ``late_warmup``; 0 before. Two
    simultaneous warm-ups are not multiplied.
    """
    if step < start:
        return 0.0
    ordinary = min(1.0, step / warmup) if warmup else 1.0
    late = min(1.0, (step - start) / late_warmup) if late_warmup else 1.0
    whole = lr_at(step, total, peak, warmup)
    return whole * min(1.0, late / ordinary) if ordinary else whole


def fresh_adam(step: int, since: int, betas: tuple[float, float]) -> float:
    """Factor that turns a step of an Adam that counts ``step`` into one of an Adam that counts ``since``.

    Adam (Kingma & Ba, ICLR 2015, algorithm 1) divides its moments by 1 - β^t. Parameters without
    gradients for a while have moments of zero, but the count continues: for β₂ = 0.999 their
    first steps are then up to six times too long. Both counts start at 1. Exact up to Adam's ε; if
    the factor is applied to the learning rate, decoupled weight decay is weaker by the same factor.
    """
    first, second = betas
    wrong = math.sqrt(1 - second**step) / (1 - first**step)
    right = math.sqrt(1 - second**since) / (1 - first**since)
    return right / wrong
