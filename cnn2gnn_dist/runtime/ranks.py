"""This process's rank and world size, read from the environment, whichever launcher started it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from cnn2gnn_dist.errors import UserError

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set by torchrun for its children: its agent hosts the store and decides where it listens."""
DEFAULT_PORT = 29500
INSIDE = ("docker", "br-", "virbr", "cni", "flannel", "veth")
"""Prefixes of the names of interfaces that lead to containers on this host."""


@dataclass(frozen=True)
class Ranks:
    """Position of this process in its group, and where the group meets.

    ``rank`` of ``world_size`` in the complete group, ``local_rank`` on its node;
    ``master_addr``/``master_port`` is rank 0's rendezvous (torch's TCP store).
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT

    @property
    def is_first(self) -> bool:
        """True on rank 0, the one that writes what is written once."""
        return self.rank == 0

    def own_address(self) -> str:
        """The address of this host that faces rank 0's; no packet is sent.

        Raises:
            UserError: ``master_addr`` can't be reached.
        """
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
                found.connect((self.meeting_address(), self.master_port))
                return str(found.getsockname()[0])
        except OSError as error:
            raise UserError(
                f"rank 0 can't be reached: {error}",
                where=f"MASTER_ADDR={self.master_addr}",
                remedy="an address that all hosts can reach",
            ) from None

    def meeting_address(self) -> str:
        """``master_addr``, or the address of this host that others can reach if its name resolves to loopback.

        Debian resolves a host's own name to 127.0.1.1: nobody can reach a rank 0 that listens there.
        """
        if is_loopback(self.master_addr) or self.on_one_host:
            return self.master_addr
        try:
            found = socket.gethostbyname(self.master_addr)
        except OSError:
            return self.master_addr
        return (first_address() or self.master_addr) if is_loopback(found) else self.master_addr

    @property
    def on_one_host(self) -> bool:
        """Whether the launcher says that all ranks are on this host."""
        return os.environ.get("LOCAL_WORLD_SIZE") == str(self.world_size)

    def environment(self) -> dict[str, str]:
        """The variables by which torch and DeepSpeed recognize this process."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Ranks:
        """Read torchrun's and DeepSpeed's variables, else Slurm's, else a single process.

        Under ``srun`` the rendezvous need not be exported: rank 0 runs on the step's first
        node, and the port is derived from the job's number.

        Raises:
            UserError: a variable is not a number, the rank is outside the world size, or
                nothing tells where rank 0 is.
        """
        env = os.environ if environ is None else environ
        if "RANK" in env and "WORLD_SIZE" in env:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
            names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        else:
            return cls()
        rank, local_rank, world_size = (_number(env, name) for name in names)
        if not 0 <= rank < world_size:
            raise UserError(
                f"rank {rank} is outside a world of size {world_size}",
                where=f"{names[0]}={rank} {names[2]}={world_size}",
                remedy="start all ranks with one launcher, or unset these variables",
            )
        by_slurm = names[0] == "SLURM_PROCID"
        address = env.get("MASTER_ADDR") or (_first_node(env) if by_slurm else "127.0.0.1")
        port = _slurm_port(env) if by_slurm else DEFAULT_PORT
        port = _number(env, "MASTER_PORT", port)
        if not 0 < port < 2**16:
            raise UserError(
                f"there is no port {port}", where=f"MASTER_PORT={port}", remedy="1 to 65535"
            )
        return cls(rank, local_rank, world_size, address, port)


def is_loopback(address: str) -> bool:
    """Whether an address, as it is written, is this host's own loopback."""
    return address in ("localhost", "::1") or address.startswith("127.")


def first_address() -> str | None:
    """The first IPv4 address of an interface that is up and leads out of this host; None if there is none."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    for name, addresses in psutil.net_if_addrs().items():
        if name not in up or name.startswith(INSIDE):
            continue
        for one in addresses:
            if one.family == socket.AF_INET and not is_loopback(one.address):
                return str(one.address)
    return None


def _first_node(env: Mapping[str, str]) -> str:
    """Where rank 0 of a Slurm step is: this host if the step has one node, else its first node."""
    listed = env.get("SLURM_STEP_NODELIST", "")
    if env.get("SLURM_STEP_NUM_NODES", "1" if not listed else "") == "1":
        return "127.0.0.1"
    if not listed:
        raise UserError(
            "neither MASTER_ADDR nor SLURM_STEP_NODELIST says where rank 0 is",
            where="MASTER_ADDR",
            remedy="export MASTER_ADDR=the step's first node before srun",
        )
    return first_host(listed)


def first_host(listed: str) -> str:
    """The first name of a Slurm host list: ``gpu[003-007,9],cpu1`` → ``gpu003``."""
    outside = re.sub(r"\[[^\]]*\]", lambda group: group[0].replace(",", ";"), listed)
    first = outside.partition(",")[0]
    return re.sub(r"\[([^\];-]+)[^\]]*\]", r"\1", first)


def _slurm_port(env: Mapping[str, str]) -> int:
    """A port that differs between jobs on one node, below those that the kernel assigns."""
    return 10_000 + (_number(env, "SLURM_JOB_ID") * 7 + _number(env, "SLURM_STEP_ID")) % 20_000


def _number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"environment variable {name} is not an integer: {text!r}",
            where=name,
            remedy="let the launcher set it, or unset it",
        ) from None
