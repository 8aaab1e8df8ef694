"""What a training step keeps for its backward pass, and how much it computes: traced on small batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

BATCHES = (2, 4)
"""Traced batches. BatchNorm refuses a single image where a map has one pixel."""


@dataclass(frozen=True)
class Trace:
    """A model's needs.

    Attributes:
        parameters: number of trained values; buffers: bytes.
        kept: bytes that an image's forward pass keeps for the backward pass.
        largest: bytes of the largest of these tensors.
        fixed: bytes that are kept regardless of the batch.
        flops: of an image's forward pass; 2 per multiply-add in matrix products and convolutions.
    """

    parameters: int
    buffers: int
    kept: float
    largest: float
    fixed: float
    flops: float


def trace(model: nn.Module, loss_of: Callable[[int], Tensor]) -> Trace:
    """Run the forward pass for batches of 2 and of 4 images, and fit a line.

    Args:
        model: on the CPU, in training mode.
        loss_of: maps a number of images to the loss of such a batch.
    """
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept, flops, largest = [], [], 0
    for batch in BATCHES:
        sizes, work = _forward(own, loss_of, batch)
        kept.append(sum(sizes))
        flops.append(work)
        largest = max(sizes, default=0)
    small, large = BATCHES
    per_image = (kept[1] - kept[0]) / (large - small)
    return Trace(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        kept=per_image,
        largest=largest / large,
        fixed=max(0.0, kept[0] - small * per_image),
        flops=(flops[1] - flops[0]) / (large - small),
    )


def _forward(own: set[int], loss_of: Callable[[int], Tensor], batch: int) -> tuple[list[int], int]:
    """Sizes of the storages that autograd keeps, and the number of operations."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage  # kept alive, so that no other storage gets its address
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(pack, lambda kept: kept):
        loss_of(batch)
    return [storage.nbytes() for storage in found.values()], int(counter.get_total_flops())
