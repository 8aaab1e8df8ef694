"""Layers whose result for an image does not depend on the other images of its batch, to the last bit.

torch uses another kernel for a single row, or for a few small images, which changes the last bits of
a result. On CPUs a matrix product over a multiple of 16 rows and of 16 columns, and oneDNN's convolution,
give each row the same bits regardless of the other rows and of its place among them. (For 2 to 11 outputs
of a number of inputs that is not divisible by 4, MKL sums in an order that changes with the row's place.)
What remains are activations whose last elements take another code path (SiLU, sigmoid): stems that have
them run in multiples of 16 images. Whether a model needs this is determined when it is opened, since it
depends on the machine. On GPUs there is no such guarantee.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.models.graph_head import Float32Linear

ROWS = 16
"""Rows and columns of a matrix product, and images of a batch, are filled up to a multiple of this."""
_TRIED = 3


class _Linear(nn.Linear):
    wide: Tensor
    """The weights, with columns of 0 up to a multiple of ROWS: they add nothing, exactly."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        count, width = flat.shape
        missing = (0, self.wide.shape[1] - width, 0, -count % ROWS)
        if any(missing):
            flat = F.pad(flat, missing)
        return F.linear(flat, self.wide, self.bias)[:count].view(*x.shape[:-1], -1)


def _wide(weight: Tensor) -> Tensor:
    missing = -weight.shape[1] % ROWS
    return F.pad(weight, (0, missing)) if missing else weight


class _Conv2d(nn.Conv2d):
    padding: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        return torch.mkldnn_convolution(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )


def smallest_batch(stem: nn.Module, size: int) -> int:
    """The number of which a batch size must be a multiple so that other images change no bit: 1 or ROWS.

    Args:
        stem: after ``make_batch_invariant``, in eval mode.
        size: side of its images, in pixels.
    """
    images = torch.randn(_TRIED, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = stem(images)
        alone = torch.cat([stem(image) for image in images.split(1)])
    return 1 if torch.equal(together, alone) else ROWS


def make_batch_invariant(model: nn.Module) -> None:
    """Make the linear and convolutional layers of a model batch-invariant, in place; for CPUs."""
    for module in model.modules():
        if type(module) in (nn.Linear, Float32Linear):
            module.__class__ = _Linear
            module.wide = _wide(cast("nn.Linear", module).weight.detach())
        elif (
            type(module) is nn.Conv2d
            and not isinstance(module.padding, str)
            and module.padding_mode == "zeros"
            and torch.backends.mkldnn.is_available()
        ):
            module.__class__ = _Conv2d
