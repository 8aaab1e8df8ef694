"""The average of a model's weights over training, and the optimizer's state, in any ZeRO stage.

The average is stored with the optimizer's moments (``state[parameter]``): ZeRO 1 to 3 divide it among the ranks in
the same way, and checkpoints read and set it like them. Uses private names of DeepSpeed (pinned,
and tested across stages).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

AVERAGE = "average"
Kind = Literal["none", "ema", "lookahead"]

MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
"""What an optimizer keeps for each parameter, by torch's name for it (Adam's are AdamW's)."""


def masters(optimizer: Any, zero_stage: int) -> list[Tensor]:
    """The fp32 weights that the optimizer updates: of this rank's share, flattened, from ZeRO 1 on."""
    if zero_stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    return [parameter for group in groups for parameter in group["params"]]


def create_state(
    optimizer: Any, zero_stage: int, moments: tuple[str, ...], step: float, average: bool
) -> None:
    """Create the optimizer's state as after ``step`` steps, with moments of 0 where there are none.

    torch creates it only in the first step. An average starts as a copy of the weights.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for parameter in masters(optimizer, zero_stage):
        state = inner.state[parameter]
        for moment in moments:
            if state.get(moment) is None:
                state[moment] = torch.zeros_like(parameter)
        if len(moments) > 1:  # SGD counts no steps
            state["step"] = torch.tensor(float(step))
        if average and AVERAGE not in state:
            state[AVERAGE] = parameter.detach().clone()


class Average:
    """The running average of weights and buffers of one engine.

    ``ema`` follows the weights (Polyak and Juditsky, 1992), ``lookahead`` also sets them to the average each
    time (Zhang et al., NeurIPS 2019, "Lookahead optimizer"): its slow weights.

    BatchNorm's running statistics are averaged in the same way, separately on each rank: they move with their
    weights, this needs no pass over images, and the mean over ranks of the averages is the average of the means, so
    that any world size can resume from it. The statistics used in training are not changed. Counters are copied.
    """

    def __init__(self, kind: Kind, optimizer: Any, zero_stage: int, module: nn.Module) -> None:
        self.kind, self.module = kind, module
        self._optimizer, self._stage = optimizer, zero_stage
        self.buffers = {name: b.detach().clone() for name, b in module.named_buffers()}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The weights and their averages."""
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        found = masters(self._optimizer, self._stage)
        return [(parameter, inner.state[parameter][AVERAGE]) for parameter in found]

    @torch.no_grad()
    def update(self, kept: float) -> None:
        """Move the average towards the weights, keeping the share ``kept`` of it (collective)."""
        for weight, average in self._pairs():
            average.lerp_(weight, 1.0 - kept)
            if self.kind == "lookahead":
                weight.copy_(average)
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point():
                self.buffers[name].lerp_(buffer, 1.0 - kept)
            else:
                self.buffers[name].copy_(buffer)
        if self.kind == "lookahead":
            self._publish()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and buffers with their averages; twice changes nothing (collective)."""
        buffers = [(b, self.buffers[name]) for name, b in self.module.named_buffers()]
        for one, other in self._pairs() + buffers:
            kept = one.detach().clone()
            one.copy_(other)
            other.copy_(kept)
        self._publish()

    def _publish(self) -> None:
        """Let the forward pass see the optimizer's weights (collective)."""
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        if self._stage == 3:
            self._optimizer._partition_all_parameters()
            for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
