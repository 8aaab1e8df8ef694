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
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives

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
        normalised, mean, variance, count = _JointNorm.apply(x, self.weight, self.bias, self.eps)
        self._track(mean, variance, count)
        return normalised

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


class _JointNorm(torch.autograd.Function):
    """BatchNorm with the joint moments of all ranks; torch's own kernels read x as it is.

    Elementary operations would copy a bfloat16 x to float32 several times: a quarter of a training
    step. Statistics are in float32 at least. With xhat = (x - mean) * invstd, n samples in all, and
    sums over all ranks, the gradient of the sum of the ranks' losses is

        dx = weight * invstd * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n).

    The kernel that takes constant moments gives the first term, and its gradients of bias and weight
    are this rank's two sums. The rest is affine in x, so it is a BatchNorm once more.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _moments_of_all(x)
        context.eps = eps
        context.kinds = [None if value is None else value.dtype for value in (weight, bias)]
        weight = None if weight is None else weight.to(mean.dtype)
        bias = None if bias is None else bias.to(mean.dtype)
        context.save_for_backward(x, weight, mean, variance, count)
        context.mark_non_differentiable(mean, variance, count)
        context.set_materialize_grads(False)
        normalised = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
        return normalised, mean, variance, count

    @staticmethod
    def backward(context: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, variance, count = context.saved_tensors
        if weight is None:
            weight = torch.ones_like(mean)
        if gradient.stride() != x.stride():  # otherwise the kernel sums dy in bfloat16 on a CPU
            gradient = torch.empty_like(x).copy_(gradient)
        inverse = torch.rsqrt(variance + context.eps)
        if x.numel():
            # The moments are given twice: of CUDA's kernels, the one for [N, C] and channels_last reads the
            # second pair, and fails without it.
            dx, dot, total = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, variance, mean, inverse, False, context.eps, [True] * 3
            )
        else:  # torch's kernel divides by zero
            dx, dot, total = torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
        joint = collectives.all_reduce_sum(torch.stack([dot, total])) / -count
        scale = weight * inverse
        dx += F.batch_norm(x, mean, variance, scale * joint[0], scale * joint[1], eps=context.eps)
        own = [
            None if kind is None else value.to(kind)
            for kind, value in zip(context.kinds, (dot, total), strict=True)
        ]
        return dx, *own, None


def _moments_of_all(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] of all ranks' samples, and their number [].

    Ranks contribute their means and variances, combined as by Chan, Golub and LeVeque (1979):
    sums of squares would lose all digits where the mean is large compared to the spread.
    """
    channels = x.shape[1]
    kind = torch.promote_types(x.dtype, torch.float32)
    # The moments have the type of the running statistics; without them, that of x.
    running = x.new_zeros(2, channels, dtype=kind)
    if x.numel():
        mean, variance = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
    else:  # torch's kernel refuses a rank without samples, and the others would wait for it
        mean, variance = running
    count = mean.new_full((1,), x.numel() / channels)
    own = torch.cat([mean, variance, count])
    rank, ranks = collectives.rank(), collectives.world_size()
    # Not an index on the device: copying it there would make the host wait.
    rows = [own.new_zeros(rank, len(own)), own[None], own.new_zeros(ranks - rank - 1, len(own))]
    all_R = collectives.all_reduce_sum(torch.cat(rows))
    mean_RC, variance_RC, count_R1 = all_R.split([channels, channels, 1], 1)
    total = count_R1.sum()
    share_R1 = count_R1 / total
    mean = (share_R1 * mean_RC).sum(0)
    spread_C = (share_R1 * (variance_RC + (mean_RC - mean).square())).sum(0)
    return mean, spread_C, total


def batch_of_norms(module: nn.Module, micro_batch: int, ranks: int) -> int | None:
    """Number of images over which a model's BatchNorms compute their statistics in training.

    A plain one sees a rank's micro-batch, ``SyncNorm`` that of all ranks. None if there is no BatchNorm.
    """
    kinds = [type(child) for child in module.modules()]
    if any(issubclass(kind, _BatchNorm) and not issubclass(kind, SyncNorm) for kind in kinds):
        return micro_batch
    return micro_batch * ranks if any(issubclass(kind, SyncNorm) for kind in kinds) else None
