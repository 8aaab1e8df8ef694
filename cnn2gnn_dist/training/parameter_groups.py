"""Which parameters decay, start late, or have a separate learning rate: the optimizer's groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn


def parameter_groups(
    model: nn.Module, decay: float, late: Collection[str], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return an optimizer's groups: by weight decay (only matrices have it), by start, and by rate.

    Parameters whose rate is 0 get gradients of 0 from now on: their own would count in the norm that is clipped, and
    a frozen stem, whose norm is several times that of what learns, would shorten all steps.

    Args:
        model: whose trainable parameters are grouped, each in one group.
        decay: weight decay of matrices; it is repeated as ``decay``, for optimizers that change theirs.
        late: names of the parameters that start late (``late`` of their group).
        rates: factors of the learning rate by name (``rate`` of their group); 1 for the others. 0: frozen.

    Raises:
        ValueError: a name that the model does not have.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if unknown := (set(late) | set(rates)) - set(dict(model.named_parameters())):
        raise ValueError(f"no parameters of these names: {sorted(unknown)}")
    for name, parameter in named.items():
        if not rates.get(name, 1.0):
            parameter.register_hook(torch.zeros_like)
    kinds = {n: (n in late, p.ndim > 1, rates.get(n, 1.0)) for n, p in named.items()}
    groups = [
        {
            "params": [p for n, p in named.items() if kinds[n] == (begins, matrix, rate)],
            "weight_decay": decay if matrix else 0.0,
            "decay": decay if matrix else 0.0,
            "late": begins,
            "rate": rate,
        }
        for begins in (False, True)
        for matrix in (True, False)
        for rate in sorted(set(kinds[n][2] for n in named))
    ]
    return [group for group in groups if group["params"]]
