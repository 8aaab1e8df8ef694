"""Learning rate over training: linear warm-up, then half a cosine; also for parameters that start late."""

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
