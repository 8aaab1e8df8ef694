"""Learning rate over training: linear warm-up, then half a cosine."""

from __future__ import annotations

import math


def lr_at(step: float, total: float, peak: float, warmup: float, final: float = 0.0) -> float:
    """Learning rate at ``step`` of ``total``, in any one unit (steps or epochs).

    Rises from 0 to ``peak`` over ``warmup``, then falls to ``final`` on a cosine
    (Loshchilov & Hutter, "SGDR", ICLR 2017, equation 5, a single period).
    """
    if step < warmup:
        return peak * step / warmup
    share = min(1.0, (step - warmup) / max(total - warmup, 1e-12))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))
