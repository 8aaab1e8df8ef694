"""A model's training state as named tensors, extracted from and loaded into any ZeRO stage.

``w/NAME`` is the fp32 weight, ``m/NAME`` and ``v/NAME`` Adam's moments (``m/NAME`` SGD's), ``b/NAME`` a buffer's mean
over the ranks, ``own-R/NAME`` rank R's own buffer (BatchNorm's statistics differ from the first step
on). ``a/NAME`` is the average of a weight, if there is one; ``c/NAME`` and ``avg-R/NAME`` are the averages
of buffers (mean, and each rank's own). Uses private names of DeepSpeed (pinned, and tested across stages and world
sizes); the three traps of ``safe_get_full_*`` are marked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.training.average import AVERAGE
from cnn2gnn_dist.training.engine import Engine, full_weight, inner_optimizer

PREFIX = {"exp_avg": "m/", "exp_avg_sq": "v/", "momentum_buffer": "m/", AVERAGE: "a/"}


def pull(engine: Engine, mine: Callable[[str], bool]) -> tuple[dict[str, Tensor], float]:
    """Named fp32 CPU tensors of the parameters selected by ``mine``, and the optimizer's step count.

    Buffers are averaged. Collective: every rank iterates over all parameters.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.deepspeed.global_steps == 0:
        engine.create_state(0.0)
    if engine.zero_stage in (1, 2):
        _relink(engine)
    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        whole = {"w/" + name: full_weight(engine, parameter)}
        for moment in _kept(engine):
            if engine.zero_stage == 0:
                value = engine.deepspeed.optimizer.state[parameter][moment]
            else:
                value = safe_get_full_optimizer_state(parameter, moment)
            whole[PREFIX[moment] + name] = value.detach().float().cpu().clone()
        if mine(name):
            found.update(whole)
    for mean_of, _, name, buffer in _buffers(engine):
        mean = collectives.mean_or_first(buffer.detach().clone())
        if mine(name):
            found[mean_of + name] = mean.cpu()
    state = next(iter(inner_optimizer(engine).state.values()))
    return found, float(state.get("step", engine.deepspeed.global_steps))  # SGD counts none


def has_other_moments(engine: Engine, tensors: dict[str, Tensor]) -> bool:
    """Whether another optimizer wrote them: SGD's momentum, as Adam's mean, would be divided by a variance of 0."""
    return ("exp_avg_sq" in engine.moments) != any(name.startswith("v/") for name in tensors)


def push(engine: Engine, tensors: dict[str, Tensor], optimizer_step: float) -> None:
    """Set weights and moments of an engine that has not stepped yet (collective).

    Moments of another optimizer are left out: its own begin at 0.
    """
    if has_other_moments(engine, tensors):
        tensors = {n: tensor for n, tensor in tensors.items() if n[:2] not in ("m/", "v/")}
        optimizer_step = 0.0
    stage, optimizer = engine.zero_stage, engine.deepspeed.optimizer
    engine.create_state(optimizer_step)
    if stage in (1, 2):
        _relink(engine)
    named = dict(engine.module.named_parameters())
    for name, parameter in named.items():
        weight = tensors["w/" + name]
        kept = {
            one: tensors.get(PREFIX[one] + name, _without(one, weight)) for one in _kept(engine)
        }
        _set(engine, parameter, weight, kept)
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        _set_gathered(named, tensors)


def digest(engine: Engine) -> str:
    """Checksum of rank 0's fp32 weights, in any ZeRO stage (collective)."""
    found = hashlib.sha256()
    for name, parameter in engine.module.named_parameters():
        found.update(name.encode() + full_weight(engine, parameter).contiguous().numpy().tobytes())
    checksum: str = collectives.broadcast_object(found.hexdigest()[:20])
    return checksum


def own_buffers(engine: Engine, rank: int) -> dict[str, Tensor]:
    """This rank's buffers, not averaged over ranks."""
    return {
        f"{own}-{rank}/{name}": buffer.detach().cpu().clone()
        for _, own, name, buffer in _buffers(engine)
    }


def push_buffers(engine: Engine, tensors: dict[str, Tensor], rank: int | None) -> None:
    """Set the buffers to ``rank``'s own if they were saved, else to their mean."""
    with torch.no_grad():
        for mean_of, own, name, buffer in _buffers(engine):
            mean = tensors.get(mean_of + name, tensors["b/" + name])
            buffer.copy_(tensors.get(f"{own}-{rank}/{name}", mean))


def _buffers(engine: Engine) -> Iterator[tuple[str, str, str, Tensor]]:
    """For each buffer: prefixes of its mean and of each rank's own, name, buffer; training's first, then averages."""
    for name, buffer in engine.module.named_buffers():
        yield "b/", "own", name, buffer
    if engine.average is not None:
        for name, buffer in engine.average.buffers.items():
            yield "c/", "avg", name, buffer


def _kept(engine: Engine) -> tuple[str, ...]:
    """Names of the optimizer's state for each parameter."""
    return (*engine.moments, AVERAGE) if engine.average is not None else engine.moments


def _without(kept: str, weight: Tensor) -> Tensor:
    """Initial optimizer state of a weight: only ``--force`` loads a checkpoint without it."""
    return weight if kept == AVERAGE else torch.zeros_like(weight)


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


def _relink(engine: Engine) -> None:
    """Trap: ZeRO 1/2 link fragments to optimizer state only once, after group 0's first step."""
    optimizer = engine.deepspeed.optimizer
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
