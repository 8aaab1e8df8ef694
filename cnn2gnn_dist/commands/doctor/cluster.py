"""``cnn2gnn doctor --cluster``: ask every node, print a table, list what keeps them from working together.

On a Ray cluster (``--address``, ``RAY_ADDRESS``, or the one that runs here), or as ranks of ``srun`` or
``torchrun``, where the first rank of each host answers and rank 0 prints.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from datetime import timedelta
from pathlib import Path

from cnn2gnn_dist.log import output
from cnn2gnn_dist.runtime.hosts import node_survey
from cnn2gnn_dist.runtime.hosts.node_survey import Node, Peer
from cnn2gnn_dist.runtime.ranks import Ranks

MEET_SECONDS = 120.0


def command(address: str | None, folder: str | None) -> int:
    """Print the table and the problems; returns 1 if there are any, else 0.

    Args:
        address: of a Ray cluster; None: see above.
        folder: that all nodes should share, such as a run's; None: not checked.

    Raises:
        UserError: no cluster answers; the ranks can't meet.
    """
    ranks = Ranks.from_environment()
    if ranks.world_size > 1 and not address:
        return _as_rank(ranks, folder)
    from cnn2gnn_dist.runtime.ray import cluster as ray_cluster
    from cnn2gnn_dist.runtime.ray import nodes as ray_nodes

    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    with ray_cluster.running(where, 1):
        nodes, failed = ray_nodes.survey(folder, secrets.token_hex(16))
    return report(nodes, failed, folder)


def report(nodes: list[Node], failed: dict[str, str], folder: str | None) -> int:
    """Print the nodes' answers; ``failed``: by address, why others gave none."""
    output(node_survey.table(nodes, folder))
    found = [(f"{address} did not answer: {why}", _remedy(why)) for address, why in failed.items()]
    found += node_survey.problems(nodes, folder)
    for what, remedy in found:
        output(f"\nFAIL  {what}\n      -> {remedy}")
    count = len(nodes) + len(failed)
    output(f"\n{count} nodes, {len(found) or 'no'} problems found")
    return 1 if found else 0


def _remedy(why: str) -> str:
    if "cnn2gnn_dist" in why:
        return "install the package there, or send it with the job: cnn2gnn submit --send-package"
    return "start it again (`ray start --address=…`), or check its log"


def _as_rank(ranks: Ranks, folder: str | None) -> int:
    import torch

    from cnn2gnn_dist.runtime.group import collectives, process_group

    process_group.join(ranks, torch.device("cpu"), timedelta(seconds=MEET_SECONDS))
    token = collectives.broadcast_object(secrets.token_hex(16))
    names = collectives.all_gather_object(socket.gethostname())
    asked = names.index(names[ranks.rank]) == ranks.rank
    node = node_survey.look(ranks.own_address(), folder)
    path = ""
    if folder and ranks.is_first:
        path, node.shared = node_survey.write_probe(folder)
    path = collectives.broadcast_object(path)
    if path and asked:
        node.shared = node_survey.find_probe(path)
    peer = Peer(node.address, token) if asked else None
    told = collectives.all_gather_object((node.address, peer.port) if peer else None)
    places = [place for place in told if place]
    if peer:
        own = places.index((node.address, peer.port))
        node_survey.measure(node, token, places[0], places[(own + 1) % len(places)])
    nodes = [one for one in collectives.all_gather_object(node if asked else None) if one]
    code = 0
    if ranks.is_first:
        if path:
            Path(path).unlink(missing_ok=True)
        code = report(nodes, {}, folder)
    code = int(collectives.broadcast_object(code))
    sys.stdout.flush()
    os._exit(code)  # gloo's threads may abort a process that finalizes (launcher.exit_now)
