"""Collectives over torch.distributed that also work for a single process without a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cnn2gnn_dist.runtime.group.heartbeats import Meeting, PeerRaised

T = TypeVar("T")


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
    """Wait for all ranks: whatever each has written before is visible when this returns.

    For ranks that arrive at about the same time; where one may take long, see ``uneven``.

    Raises:
        RuntimeError: a rank is missing, or did not arrive in time (gloo's, NCCL's).
    """
    if world_size() > 1:
        # Not dist.barrier: under NCCL that guesses a device and warns. The sum is read because
        # a collective on CUDA is only queued when its call returns; the host would run ahead.
        here = int(all_reduce_sum(torch.ones(1, device=_device())).item())
        if here != world_size():
            raise RuntimeError(f"a barrier of {world_size()} ranks counted {here}")


@contextmanager
def uneven() -> Iterator[None]:
    """Work that may take one rank longer than ``cluster.timeout_s``; all leave together.

    The others wait for a working rank as long as its process sends heartbeats; one that is gone
    or stopped is noticed within the timeout. What a rank raises inside is raised on all ranks.
    Collective, and the block must not contain a collective that the other ranks don't join.
    """
    if world_size() == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    timeout_s = cast(Any, store).timeout.total_seconds()
    meeting = Meeting(dist.PrefixStore("uneven", store), rank(), world_size(), timeout_s)
    with meeting.uneven():
        yield


def alone(work: Callable[[], T]) -> T:
    """Rank 0 does the work, however long it takes; all ranks get its result or raise its error.

    What the work has left on disk is visible when this returns. No progress is recorded here:
    interrupted work is repeated, unless it checks for what it had done.
    """
    result: Any = None
    with uneven():
        if rank() == 0:
            result = work()
    return broadcast_object(result)


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
    """Whether an error means that another rank is gone or silent, not that this rank failed."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    if isinstance(
        error, PeerRaised
    ):  # whatever it says: a store may have refused that rank's connection
        return False
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
