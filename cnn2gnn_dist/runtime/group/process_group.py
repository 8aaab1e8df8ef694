"""torch's process group: which rank hosts its store, on which address, and each rank's device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import distributed as dist

from cnn2gnn_dist.errors import UserError, first_line
from cnn2gnn_dist.runtime.bounded_wait import BoundedStore
from cnn2gnn_dist.runtime.group import members, rendezvous
from cnn2gnn_dist.runtime.ranks import AGENT_STORE, Ranks, is_loopback

LOOPBACK = (
    "on several hosts MASTER_ADDR must be the address of rank 0's host, not a loopback address"
)
DECLINE_S = 10.0
"""Seconds for which a rank that can't join waits for others, to pass its error on."""


def join(
    ranks: Ranks,
    device: torch.device,
    timeout: timedelta,
    about: Mapping[str, Any] | None = None,
    problem: UserError | None = None,
) -> None:
    """Join the group: NCCL on GPUs, gloo on CPUs.

    A single process needs no port. Otherwise rank 0 hosts a store that listens only at the
    rendezvous, unless torchrun's agent hosts it. There the ranks exchange what they run
    (``members``) before they form the group.

    Args:
        ranks: this process.
        device: of this rank.
        timeout: of every collective.
        about: this rank's config by dotted field: all ranks must have the same.
        problem: what keeps this rank from joining; all ranks then raise it.

    Raises:
        UserError: the port is taken; a network interface that the environment names is missing;
            the other ranks did not arrive within ``timeout``, can't join, or differ from this one.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    problem = problem or _interface_problem(ranks, backend)
    if ranks.world_size == 1 and problem is not None:
        raise problem
    hosted = _store(ranks, timeout)
    seconds = timeout.total_seconds()
    attempt = members.begin_attempt(
        BoundedStore(hosted, seconds), ranks.rank, ranks.world_size, timeout
    )
    store = dist.PrefixStore(f"default_pg/{attempt}", hosted)
    own = members.Member.here(ranks.rank, about, problem, device.type)
    members.meet(BoundedStore(store, seconds), own, ranks.world_size, timeout)
    # With the device known up front, NCCL's communicator exists when later groups split it.
    eager = device if backend == "nccl" and ranks.world_size > 1 else None
    dist.init_process_group(
        backend,
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        device_id=eager,
    )


def decline(ranks: Ranks, problem: UserError) -> NoReturn:
    """Tell the others, who may be waiting for this rank, why it can't join.

    Raises:
        UserError: what keeps this rank, and others that arrive within ``DECLINE_S``, from joining.
    """
    if ranks.world_size > 1:
        timeout = timedelta(seconds=DECLINE_S)
        try:
            join(ranks, torch.device("cpu"), timeout, problem=problem)
        except members.NotMet:
            raise problem from None
    raise problem


def _interface_problem(ranks: Ranks, backend: str) -> UserError | None:
    """Choose gloo's interface; return what is wrong with the one that the environment names."""
    try:
        rendezvous.check_interfaces(backend)
    except UserError as error:
        return error
    if rendezvous.GLOO not in os.environ and (name := rendezvous.interface_facing(ranks)):
        os.environ[rendezvous.GLOO] = name
    return None


def _store(ranks: Ranks, timeout: timedelta) -> dist.Store:
    if ranks.world_size == 1:
        return dist.HashStore()
    hosted_here = ranks.is_first and os.environ.get(AGENT_STORE) != "True"
    socket = rendezvous.listen(ranks).detach() if hosted_here else None
    try:
        return dist.TCPStore(
            ranks.meeting_address(),
            ranks.master_port,
            ranks.world_size,
            is_master=hosted_here,
            timeout=timeout,
            wait_for_workers=False,  # ``members`` waits, and names the missing ones
            master_listen_fd=socket,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = f"MASTER_ADDR={ranks.master_addr} MASTER_PORT={ranks.master_port}"
        raise members.NotMet(
            f"rank {ranks.rank} of {ranks.world_size} could not meet the others within "
            f"{timeout.total_seconds():g} s: {first_line(error)}",
            where=place,
            remedy=members.CHECK_OTHERS + f"; {LOOPBACK}" * is_loopback(ranks.master_addr),
        ) from None


def device_index(local_rank: int, visible: int) -> int:
    """Index of this rank's GPU among those that this process sees.

    A launcher that shows each task one GPU (``srun --gpus-per-task=1``) numbers it 0 in each.

    Raises:
        UserError: fewer GPUs than ranks on this host.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1:
        return 0
    raise UserError(
        f"rank {local_rank} of this host has no GPU: it sees only {visible}",
        where=f"LOCAL_RANK={local_rank}",
        remedy=f"at most {visible} ranks per host, or one visible GPU for each "
        "(srun --gpus-per-task=1); device=cpu needs none",
    )
