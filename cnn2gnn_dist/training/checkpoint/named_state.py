"""A model's training state as named tensors, extracted from and loaded into any ZeRO stage.

``w/NAME`` is the fp32 weight, ``m/NAME`` and ``v/NAME`` Adam's moments (``m/NAME`` SGD's), ``b/NAME`` a buffer's mean
over the ranks, ``own-R/NAME`` rank R's own buffer (BatchNorm's statistics differ from the first step
on). Uses private names of DeepSpeed (pinned, and tested across stages and world sizes); the three
traps of ``safe_get_full_*`` are marked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnn2gnn_dist.runtime import collectives
from cnn2gnn_dist.training.engine import Engine, full_weight, inner_optimizer

PREFIX = {"exp_avg": "m/", "exp_avg_sq": "v/", "momentum_buffer": "m/"}


def pull(engine: Engine, mine: Callable[[str], bool]) -> tuple[dict[str, Tensor], float]:
    """Named fp32 CPU tensors of the parameters selected by ``mine``, and the optimizer's step count.

    Buffers are averaged. Collective: every rank iterates over all parameters.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.deepspeed.global_steps == 0:
        _create_state(engine, 0.0)
    if engine.zero_stage in (1, 2):
        _relink(engine)
    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        whole = {"w/" + name: full_weight(engine, parameter)}
        for moment in engine.moments:
            if engine.zero_stage == 0:
                value = engine.deepspeed.optimizer.state[parameter][moment]
            else:
                value = safe_get_full_optimizer_state(parameter, moment)
            whole[PREFIX[moment] + name] = value.detach().float().cpu().clone()
        if mine(name):
            found.update(whole)
    for name, buffer in engine.module.named_buffers():
        mean = collectives.mean_or_first(buffer.detach().clone())
        if mine(name):
            found["b/" + name] = mean.cpu()
    state = next(iter(inner_optimizer(engine).state.values()))
    return found, float(state.get("step", engine.deepspeed.global_steps))  # SGD counts none


def push(engine: Engine, tensors: dict[str, Tensor], optimizer_step: float) -> None:
    """Set weights and moments of an engine that has not stepped yet (collective)."""
    stage, optimizer = engine.zero_stage, engine.deepspeed.optimizer
    _create_state(engine, optimizer_step)
    if stage in (1, 2):
        _relink(engine)
    named = dict(engine.module.named_parameters())
    for name, parameter in named.items():
        moments = {moment: tensors[PREFIX[moment] + name] for moment in engine.moments}
        _set(engine, parameter, tensors["w/" + name], moments)
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        _set_gathered(named, tensors)


def own_buffers(engine: Engine, rank: int) -> dict[str, Tensor]:
    """This rank's buffers, not averaged."""
    return {
        f"own-{rank}/{name}": buffer.detach().cpu().clone()
        for name, buffer in engine.module.named_buffers()
    }


def push_buffers(engine: Engine, tensors: dict[str, Tensor], rank: int | None) -> None:
    """Set the buffers to ``rank``'s own where they were saved, else to their mean."""
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            mean = tensors["b/" + name]
            buffer.copy_(tensors.get(f"own-{rank}/{name}", mean))


def _set(engine: Engine, parameter: Any, weight: Tensor, moments: dict[str, Tensor]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if engine.zero_stage == 0:
        parameter.data.copy_(weight)
        for moment, value in moments.items():
            engine.deepspeed.optimizer.state[parameter][moment].copy_(value)
        return
    # safe_set expects the value on the device of the parameter's partition.
    safe_set_full_fp32_param(parameter, weight.to(engine.device))
    for moment, value in moments.items():
        safe_set_full_optimizer_state(parameter, value.to(engine.device), moment)


def _set_gathered(named: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Trap: without this ZeRO-3's first forward still uses the old weights."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(named.values()), modifier_rank=0):
        for name, parameter in named.items():
            parameter.data.copy_(tensors["w/" + name])


def _create_state(engine: Engine, optimizer_step: float) -> None:
    """Trap: the optimizer's state is empty until the first step."""
    inner = inner_optimizer(engine)
    groups: list[dict[str, Any]] = inner.param_groups
    if engine.zero_stage == 3:
        groups = [{"params": engine.deepspeed.optimizer.fp32_partitioned_groups_flat}]
    for group in groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            for moment in engine.moments:
                if state.get(moment) is None:
                    state[moment] = torch.zeros_like(parameter)
            if len(engine.moments) > 1:
                state["step"] = torch.tensor(float(optimizer_step))


def _relink(engine: Engine) -> None:
    """Trap: ZeRO 1/2 link fragments to optimizer state only once, after group 0's first step."""
    optimizer = engine.deepspeed.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
