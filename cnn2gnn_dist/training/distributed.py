"""Collectives over torch.distributed that also work for a single process without a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_initialised() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank; 0 without a group."""
    return dist.get_rank() if is_initialised() else 0


def world_size() -> int:
    """Ranks in the group; 1 without a group."""
    return dist.get_world_size() if is_initialised() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        # Not dist.barrier: under NCCL that guesses a device and warns.
        all_reduce_sum(torch.zeros(1, device=_device()))


def broadcast_object(value: Any) -> Any:
    """Rank 0's object, on every rank (pickled: trusted peers only)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place; returns the tensor."""
    return all_reduce_sum(tensor).div_(world_size())


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another rank is gone or silent, not that something is wrong here."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    return any(word in text for word in ("Connection closed by peer", "Connection reset by peer",
        "Timed out waiting", "Broken pipe", "Connection refused", "gloo::"))  # fmt: skip


def any_rank(value: bool) -> bool:
    """Whether it is true on any rank (collective)."""
    return bool(all_reduce_sum(torch.tensor(float(value), device=_device())) > 0)


def mean_or_first(tensor: Tensor) -> Tensor:
    """Mean over ranks of a floating tensor, rank 0's of another, in place; returns the tensor."""
    return all_reduce_mean(tensor) if tensor.is_floating_point() else broadcast(tensor)


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's values, in place on every rank; returns the tensor."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def _device() -> torch.device:
    nccl = is_initialised() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
