"""DistDGL for a group of ranks: an address, a partition and a machine per rank."""

from __future__ import annotations

import socket

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.distdgl.served import ServedGraph, Task
from cnn2gnn_dist.graph.version import GraphVersion
from cnn2gnn_dist.runtime.group import collectives
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
        UserError: ranks share a host whose kernel refuses mount namespaces (on every rank).
    """
    ranks, config = context.ranks, context.config
    address, isolated = ranks.own_address(), can_isolate()
    with socket.create_server((address, 0)) as found:
        mine = (socket.gethostname(), isolated, address, int(found.getsockname()[1]))
        everyone = collectives.all_gather_object(mine)
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
    return ServedGraph(
        task,
        np.flatnonzero(np.asarray(version.part) == ranks.rank),
        len(version.part),
        isolated=isolated,
        timeout_s=config.cluster.timeout_s,
    )
