"""Layers whose result for an image does not depend on the other images of its batch, to the last bit.

torch chooses another kernel for one row, or for a few small images, and the last bits of a result
change with it. On CPUs a matrix product over a multiple of 16 rows, and oneDNN's convolution, give
each row the same bits whatever the other rows are (tested over timm's families in
``tests/unit/inference/test_batch_invariance.py``). On GPUs there is no such guarantee.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.models.graph_head import Float32Linear

ROWS = 16


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        count = len(flat)
        if missing := -count % ROWS:
            flat = torch.cat([flat, flat.new_zeros(missing, flat.shape[1])])
        return F.linear(flat, self.weight, self.bias)[:count].view(*x.shape[:-1], -1)


class _Conv2d(nn.Conv2d):
    padding: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        return torch.mkldnn_convolution(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )


def make_batch_invariant(model: nn.Module) -> None:
    """Make the linear and convolutional layers of a model batch-invariant, in place; for CPUs."""
    for module in model.modules():
        if type(module) in (nn.Linear, Float32Linear):
            module.__class__ = _Linear
        elif (
            type(module) is nn.Conv2d
            and not isinstance(module.padding, str)
            and module.padding_mode == "zeros"
            and torch.backends.mkldnn.is_available()
        ):
            module.__class__ = _Conv2d
