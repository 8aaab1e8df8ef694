"""BatchNorm over all ranks, differentiable, on gloo as on NCCL.

The student's ranks own partitions of a graph of alike images, so one rank's batch is not a
fair sample of the data: it may hold half of the classes. Statistics of a rank's batch alone
would then differ from those at evaluation. (torch's SyncBatchNorm wants a GPU.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.training import distributed


class SyncNorm(nn.Module):
    """BatchNorm of inputs [N, C, ...] with the moments of all ranks' samples together.

    Takes over the weights and buffers of a BatchNorm, under the same names. Every rank must
    call it equally often; ranks may hold different numbers of samples.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.eps, self.momentum = norm.eps, 0.1 if norm.momentum is None else norm.momentum
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; in evaluation mode with the running statistics."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        axes = [axis for axis in range(x.ndim) if axis != 1]
        wide = x.float()
        count = wide.new_full((1,), x.numel() / x.shape[1])
        sums = torch.cat([wide.sum(axes), (wide * wide).sum(axes), count])
        total = _AllReduceSum.apply(sums)
        mean, square = (total[:-1] / total[-1]).chunk(2)
        variance = (square - mean * mean).clamp(min=0)
        self._track(mean.detach(), variance.detach(), total[-1].detach())
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        self.num_batches_tracked += 1


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return distributed.all_reduce_sum(value.clone())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return distributed.all_reduce_sum(gradient.clone())


def synchronise_norms(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm below ``module`` in place; names of tensors stay the same."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, SyncNorm(child))
        else:
            synchronise_norms(child)
    return module
