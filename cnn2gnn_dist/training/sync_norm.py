"""Differentiable BatchNorm across all ranks, on gloo as well as NCCL.

The student's ranks own partitions of a graph of similar images, so one rank's batch is not a
representative sample of the data: it may contain half of the classes. Statistics of a single rank's
batch would then differ from those at evaluation. (torch's SyncBatchNorm requires a GPU.)

A norm is converted in place, by changing its class: weights, buffers, activation, drop, hooks and
references to it stay as they are. Only layers of exactly a known type are converted, since a subclass
may do more than normalize; every other layer that uses batch statistics is refused.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime import collectives

_TIMM = "timm.layers.norm_act"
_RUNNING = ("running_mean", "running_var")


class SyncNorm(_BatchNorm):
    """BatchNorm of inputs [N, C, ...] with the joint moments of all ranks' samples.

    Every rank must call it equally often; ranks may hold different numbers of samples. On one
    rank, and in evaluation mode, it is bit-identical to the original BatchNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; in evaluation mode with the running statistics."""
        if not self.training or collectives.world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        return self._normalised(x)

    def _normalised(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        mean, variance, count = _moments_of_all(wide)
        self._track(mean.detach(), variance.detach(), count)
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # None: the mean of all batches so far.
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean += share * (mean.to(self.running_mean.dtype) - self.running_mean)
        self.running_var += share * (unbiased.to(self.running_var.dtype) - self.running_var)


class SyncNorm1d(SyncNorm, nn.BatchNorm1d):
    """Over [N, C] or [N, C, L]."""


class SyncNorm2d(SyncNorm, nn.BatchNorm2d):
    """Over [N, C, H, W]."""


class SyncNorm3d(SyncNorm, nn.BatchNorm3d):
    """Over [N, C, D, H, W]."""


_SYNCHRONISED: dict[type[nn.Module], type[SyncNorm]] = {
    nn.BatchNorm1d: SyncNorm1d,
    nn.BatchNorm2d: SyncNorm2d,
    nn.BatchNorm3d: SyncNorm3d,
}


def synchronise_norms(module: nn.Module) -> nn.Module:
    """Make every BatchNorm of ``module`` use all ranks' samples, in place; returns the module.

    Raises:
        UserError: a layer uses batch statistics and is of no known type; in that case nothing is
            changed.
    """
    known = dict(_SYNCHRONISED)
    loaded = sys.modules.get(_TIMM)  # no layer has a type whose module isn't loaded
    if loaded is not None:
        known[loaded.BatchNormAct2d] = _norm_and_act(loaded.BatchNormAct2d)
    found = list(module.named_modules())
    for name, child in found:
        if type(child) not in known and not isinstance(child, SyncNorm):
            _refuse_others(name, child)
    for _, child in found:
        if type(child) in known:
            child.__class__ = known[type(child)]
    return module


def is_synchronised(module: nn.Module) -> bool:
    """Whether the module's forward and backward passes have collectives of ours."""
    return any(isinstance(child, SyncNorm) for child in module.modules())


def _norm_and_act(kind: type[nn.Module]) -> type[SyncNorm]:
    """The synchronized form of timm's layer that normalizes, drops and activates."""
    if kind not in _NORM_AND_ACT:

        class SyncNormAct2d(SyncNorm, kind):  # type: ignore[valid-type, misc]
            """Over [N, C, H, W], then drop and activation."""

            drop: nn.Module
            act: nn.Module

            def _normalised(self, x: Tensor) -> Tensor:
                return self.act(self.drop(super()._normalised(x)))

        _NORM_AND_ACT[kind] = SyncNormAct2d
    return _NORM_AND_ACT[kind]


_NORM_AND_ACT: dict[type[nn.Module], type[SyncNorm]] = {}


def _refuse_others(name: str, child: nn.Module) -> None:
    """Refuse subclasses of BatchNorm, and other layers that keep batch statistics."""
    if isinstance(child, _InstanceNorm):  # each image separately
        return
    keeps = any(own in _RUNNING for own, _ in child.named_buffers(recurse=False))
    if not keeps and not isinstance(child, _BatchNorm):
        return
    kind = f"{type(child).__module__}.{type(child).__name__}"
    raise UserError(
        f"the layer {name or 'given'} is a {kind}, whose statistics can't be synchronized "
        "across ranks (only those of BatchNorm and timm's BatchNormAct2d can)",
        where="student.stem, student.stem_args",
        remedy="a norm_layer of batchnorm2d or one that normalizes each image by itself "
        "(groupnorm1, layernorm2d), another student.stem, or one rank",
    )


def _moments_of_all(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of all ranks' samples, and their number [].

    Ranks contribute their means and variances, combined as by Chan, Golub and LeVeque (1979):
    sums of squares would lose all digits where the mean is large compared to the spread.
    """
    channels = wide.shape[1]
    axes = [axis for axis in range(wide.ndim) if axis != 1]
    variance, mean = torch.var_mean(wide, axes, correction=0)
    count = wide.new_full((1,), wide.numel() / channels)
    own = torch.cat([mean, variance, count])
    rank, ranks = collectives.rank(), collectives.world_size()
    # Not an index on the device: copying it there would make the host wait.
    rows = [wide.new_zeros(rank, len(own)), own[None], wide.new_zeros(ranks - rank - 1, len(own))]
    all_R = _AllReduceSum.apply(torch.cat(rows))
    mean_RC, variance_RC, count_R1 = all_R.split([channels, channels, 1], 1)
    count_R1 = count_R1.detach()
    total = count_R1.sum()
    share_R1 = count_R1 / total
    mean = (share_R1 * mean_RC).sum(0)
    spread_C = (share_R1 * (variance_RC + (mean_RC - mean).square())).sum(0)
    return mean, spread_C, total


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return collectives.all_reduce_sum(value.clone())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return collectives.all_reduce_sum(gradient.clone())


def batch_of_norms(module: nn.Module, micro_batch: int, ranks: int) -> int | None:
    """Number of images over which a model's BatchNorms compute their statistics in training.

    A plain one sees a rank's micro-batch, ``SyncNorm`` that of all ranks. None if there is no BatchNorm.
    """
    kinds = [type(child) for child in module.modules()]
    if any(issubclass(kind, _BatchNorm) and not issubclass(kind, SyncNorm) for kind in kinds):
        return micro_batch
    return micro_batch * ranks if any(issubclass(kind, SyncNorm) for kind in kinds) else None
