"""DistDGL for a group of ranks: an address, a partition and a machine per rank."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.distdgl.served import ServedGraph, Task
from cnn2gnn_dist.graph.version import GraphVersion
from cnn2gnn_dist.runtime.group import exchange
from cnn2gnn_dist.runtime.supervisor import can_isolate
from cnn2gnn_dist.stages.shared.context import Context


def hosts_in_conflict(ranks: list[tuple[str, bool]]) -> list[str]:
    """Hosts with more than one rank (host, can be isolated) where some rank can't be isolated."""
    hosts = [host for host, _ in ranks]
    return [host for host, can in ranks if hosts.count(host) > 1 and not can]


def serve(context: Context, version: GraphVersion) -> ServedGraph:
    """Start this rank's server and client, and wait for all others' (collective).

    They listen only on the address by which this host reaches rank 0.

    Raises:
        PeerLost: one did not start in time.
        UserError: ranks share a host whose kernel refuses mount namespaces; a rank can't reach rank 0, or
            start its server (each on every rank).
    """
    with ExitStack() as ports:
        return _served(context, version, ports)


def _served(context: Context, version: GraphVersion, ports: ExitStack) -> ServedGraph:
    """``serve``; ``ports`` holds this rank's port until its server listens there."""
    ranks, config = context.ranks, context.config

    def look() -> tuple[str, bool, str, int]:
        address = ranks.own_address()
        port = _held_port(address, ports)
        return socket.gethostname(), can_isolate(), address, port

    everyone = exchange.every_rank(look)
    hosts = hosts_in_conflict([(host, can) for host, can, *_ in everyone])
    if hosts:
        raise UserError(
            f"the DGL servers of several ranks share {hosts[0]}, whose kernel denies this user "
            "the mount namespaces that isolate their shared memory",
            where="graph.sampling.sampler=distdgl",
            remedy="run as root, allow user namespaces, one rank per host, or graph.sampling.sampler=table",
        )
    task = Task(
        version=str(version.path.resolve()),
        part=ranks.rank,
        folder=str((context.folder / "distdgl" / f"rank-{ranks.rank:02d}").resolve()),
        addresses=[(host, port) for *_, host, port in everyone],
        seed=config.seed,
    )
    started: list[ServedGraph] = []

    def start() -> None:
        started.append(
            ServedGraph(
                task,
                np.flatnonzero(np.asarray(version.part) == ranks.rank),
                len(version.part),
                isolated=everyone[ranks.rank][1],
                timeout_s=config.cluster.timeout_s,
            )
        )

    try:  # DGL's servers wait for each other: none of them may be missing
        exchange.every_rank(start)
        started[0].connect()
    except BaseException:
        for one in started:
            one.close()
        raise
    return started[0]


def _held_port(address: str, ports: ExitStack) -> int:
    """A free port, which no other process gets while ``ports`` is open: DGL takes seconds to listen there.

    A socket that is bound but doesn't listen keeps a port from all but sockets that are bound with SO_REUSEADDR to
    this very port, as DGL's are.
    """
    held = ports.enter_context(socket.socket())
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((address, 0))
    return int(held.getsockname()[1])
