"""The precision that a model computes in: the run's config, ``ds_config.json`` and the device decide."""

from __future__ import annotations

from typing import Any

import torch

from cnn2gnn_dist.errors import UserError


def has_bfloat16(device: str) -> bool:
    """Whether the device has bfloat16 instructions: GPUs are assumed to, CPUs are queried.

    Without them torch emulates bfloat16, about eight times slower than float32.
    """
    if device != "cpu":
        return True
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in asked)


def choose(precision: str, device: str, ds: dict[str, Any], everywhere: bool = True) -> torch.dtype:
    """torch.bfloat16 or torch.float32.

    Args:
        precision: the config's ``precision``. "auto": bfloat16 where the device has it, unless
            ``torch_autocast.enabled`` of ds_config is false.
        device: "cpu" or "cuda".
        ds: the DeepSpeed config as read.
        everywhere: whether the devices of all other ranks have bfloat16: "auto" means the same on all.

    Raises:
        UserError: ``precision`` and ``torch_autocast.enabled`` contradict each other.
    """
    autocast = ds.get("torch_autocast")
    enabled = autocast.get("enabled", "auto") if isinstance(autocast, dict) else "auto"
    if precision == "auto":
        low = enabled is not False and everywhere and has_bfloat16(device)
        return torch.bfloat16 if low else torch.float32
    low = precision == "bfloat16"
    if enabled not in ("auto", low):
        raise UserError(
            f"precision={precision}, but torch_autocast.enabled is {str(enabled).lower()} in ds_config",
            where="precision",
            remedy='set torch_autocast.enabled to "auto", or precision=auto',
        )
    return torch.bfloat16 if low else torch.float32
