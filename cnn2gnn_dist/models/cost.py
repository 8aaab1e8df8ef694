"""Cost of a model: parameters and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Count the trainable values."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count_flops(function: Callable[..., Any], *inputs: Any) -> int:
    """Count the operations of ``function(*inputs)``: 2 per multiply-add, matmuls and convolutions only.

    Runs the function once, without gradients. Modules are counted in evaluation mode and then
    restored to their previous mode.
    """
    modes = [(m, m.training) for m in function.modules()] if isinstance(function, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(*inputs)
        return int(counter.get_total_flops())
    finally:
        for module, training in modes:
            module.training = training
