"""A Ray cluster of four nodes on loopback, and where ranks and readers land on it.

A program of its own, because a process can have only one Ray:

python -m tests.support.placed FOLDER       prints one line of JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ranks import Ranks
from tests.support.shards import make_shards, random_images

HERE = "tests.support.placed:"


def where(ranks: Ranks) -> tuple[str, int, str]:
    """Node, local rank and actor name of a rank."""
    import ray

    context = ray.get_runtime_context()
    return context.get_node_id(), ranks.local_rank, context.get_actor_name()


def where_again(ranks: Ranks, folder: str) -> tuple[str, str]:
    """Nodes of a rank before and after rank 1 has died once, when all had noted theirs."""
    node = where(ranks)[0]
    note = Path(folder, f"rank-{ranks.rank}")
    if not note.exists():
        durable.write_text(note, node)
        if ranks.rank == 1:
            while not all(Path(folder, f"rank-{r}").exists() for r in range(ranks.world_size)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    return note.read_text(), node


def where_with_fewer(ranks: Ranks, folder: str) -> tuple[str, int, int]:
    """Node, rank and world size; if there are two ranks, rank 1 asks for the end of its node."""
    node = where(ranks)[0]
    if ranks.world_size == 2:
        if ranks.rank == 1:
            Path(folder, "remove.tmp").write_text(node)
            Path(folder, "remove.tmp").rename(Path(folder, "remove"))
        signal.pause()
    return node, ranks.rank, ranks.world_size


def with_fewer(folder: Path, cluster: Any, trainers: list[Any]) -> dict[str, Any]:
    """A group of two ranks on two nodes, one of which ends for good and takes its rank with it."""
    from cnn2gnn_dist.runtime.ray.group import GroupSpec, run_group

    lost: list[str] = []

    def end_a_node() -> None:
        while not (note := folder / "remove").exists():
            time.sleep(0.1)
        (node,) = [one for one in trainers if one.node_id == note.read_text()]
        lost.append(node.node_id)
        cluster.remove_node(node, allow_graceful=False)

    ending = threading.Thread(target=end_a_node, daemon=True)
    ending.start()
    how: dict[str, Any] = {"strategy": "STRICT_SPREAD", "resources": {"trainer": 1}, "wait_s": 2}
    group = run_group(
        f"{HERE}where_with_fewer", {"folder": str(folder)}, GroupSpec(2, **how, fewer=[1])
    )
    ending.join()
    return {"group": group, "lost": lost}


def readers(folder: Path, resources: dict[str, float]) -> list[str]:
    """Nodes of two readers that have read something."""
    from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
    from cnn2gnn_dist.data.index.manifest import index
    from cnn2gnn_dist.data.reading.pool import ReaderPool
    from cnn2gnn_dist.data.reading.reader import ReaderSpec, Request

    shards = make_shards(folder, random_images(20), np.arange(20) % 7, shard_size=10)
    index(shards, progress=False).save(folder / "m.arrow")
    spec = ReaderSpec(str(folder / "m.arrow"), ViewSpec("crop_flip", 32, seed=5))
    with ReaderPool(spec, backend="ray", workers=2, prefetch=2, resources=resources) as pool:
        (batch,) = pool.batches([Request(np.arange(20), CLEAN)])
        assert len(batch.ids) == 20
        return [_node_of(reader.actor) for reader in pool._readers._readers]


def no_room(spec: Any) -> None:
    """Ask for more than there is, with short timeouts."""
    from cnn2gnn_dist.runtime.ray import group as ray_group

    ray_group.READY_SECONDS = ray_group.FEWER_SECONDS = 2.0
    ray_group.run_group(f"{HERE}where", {}, spec)


def _node_of(actor: Any) -> str:
    import ray

    table = ray._private.state.actors(actor._actor_id.hex())
    return str(table["Address"]["NodeID"])


def main(folder: Path) -> None:
    import ray
    import ray._private.services as services
    from ray.cluster_utils import Cluster

    from cnn2gnn_dist.runtime.ray import nodes as ray_nodes
    from cnn2gnn_dist.runtime.ray.group import GroupSpec, run_group

    # Otherwise Ray replaces 127.0.0.1 by the machine's address, where nothing listens.
    services.resolve_ip_for_localhost = lambda address, *_: address
    here = {"node_ip_address": "127.0.0.1"}
    head = {"num_cpus": 0, "include_dashboard": False, **here}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    trainers = [cluster.add_node(num_cpus=2, resources={"trainer": 2}, **here) for _ in range(2)]
    cpus = cluster.add_node(num_cpus=4, resources={"reader": 4}, **here)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    found: dict[str, Any] = {"trainers": [one.node_id for one in trainers], "cpus": cpus.node_id}
    try:
        for name, spec in {
            "pack": GroupSpec(2),
            "spread": GroupSpec(2, strategy="SPREAD"),
            "pinned": GroupSpec(2, strategy="STRICT_SPREAD", resources={"trainer": 1}),
            "two each": GroupSpec(4, ranks_per_node=2, resources={"trainer": 1}),
        }.items():
            found[name] = run_group(f"{HERE}where", {}, spec)
        again = GroupSpec(4, ranks_per_node=2, resources={"trainer": 1})
        nodes, failed = ray_nodes.survey(str(folder), "token")
        found["survey"] = [asdict(node) for node in nodes], failed
        found["again"] = run_group(f"{HERE}where_again", {"folder": str(folder)}, again)
        found["readers"] = readers(folder / "shards", {"reader": 1})
        found["fewer"] = with_fewer(folder, cluster, trainers)
        for name, wrong in {
            "no reader": lambda: readers(folder / "none", {"readers": 1}),
            "uneven": lambda: run_group(f"{HERE}where", {}, GroupSpec(3, ranks_per_node=2)),
            "no room": lambda: no_room(
                GroupSpec(3, strategy="STRICT_SPREAD", resources={"trainer": 1}, fewer=[2])
            ),
        }.items():
            try:
                wrong()
            except UserError as error:
                found[name] = str(error)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
