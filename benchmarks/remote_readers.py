"""Readers on another node of a Ray cluster compared with readers on their rank's node.

    python benchmarks/remote_readers.py                       photographs at 224 pixels, and CIFAR-10: about 3 minutes

Two Ray nodes with object stores of their own, on this machine and over loopback: what a rank reads from the other
node is copied from store to store by TCP, as between hosts, but no network limits it. Each node has two readers;
they take turns over the rounds. Images per second of processor time count the processes of both nodes, Ray's own
among them, which other work on the machine disturbs less than images per second. The last column is the
bandwidth that a rank would need for that many images per second.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from loaders import inputs
from loaders.job import Job
from tqdm import tqdm

from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import ReaderSpec, Request

READERS, AHEAD = 2, 4
NODES = ("here", "away")


def worked() -> float:
    """Seconds of processor time of this process and all below it, Ray's servers included."""
    found = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return float(sum(sum(one.cpu_times()[:4]) for one in found))


def read(job: Job, node: str, batches: int) -> dict[str, float]:
    """Read batches by readers on a node; the first ones start the readers and are not counted."""
    from cnn2gnn_dist.data.index.manifest import Manifest

    order = Order(Manifest.load(job.manifest).shard_sizes, seed=0, global_batch=job.batch, window=8)
    settle = 2 * READERS * AHEAD
    epoch = order.batches_per_epoch
    requests = [
        Request(order.batch(*divmod(number, epoch)), number // epoch)
        for number in range(settle + batches)
    ]
    spec = ReaderSpec(job.manifest, job.views)
    with ReaderPool(
        spec, backend="ray", workers=READERS, prefetch=AHEAD, resources={node: 1}
    ) as pool:
        for number, batch in enumerate(pool.batches(requests)):
            if number == settle:
                began, before = time.perf_counter(), worked()
            total = int(np.asarray(batch.images).nbytes)
        images = (batches - 1) * job.batch
        seconds, spent = time.perf_counter() - began, worked() - before
    return {
        "images_per_s": images / seconds,
        "images_per_cpu_s": images / spent,
        "bytes": total / job.batch,
    }


def table(found: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """Medians over the rounds; the ratio is taken within each round."""
    lines = [
        "| images | readers | images/s | images per processor second | relative to here | bytes per image | Mbit/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kind, node), rounds in found.items():
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        pairs = zip(rounds, found[kind, NODES[0]], strict=True)
        ratio = statistics.median(a["images_per_cpu_s"] / b["images_per_cpu_s"] for a, b in pairs)
        rate = middle["images_per_s"] * middle["bytes"] * 8 / 1e6
        lines.append(
            f"| {kind} | {node} | {middle['images_per_s']:,.0f} | {middle['images_per_cpu_s']:,.0f} | {ratio:.2f} "
            f"| {middle['bytes']:,.0f} | {rate:,.0f} |"
        )
    return "\n".join(lines)


def two_nodes() -> Any:
    """A cluster of two nodes on loopback."""
    import ray
    import ray._private.services as services
    from ray.cluster_utils import Cluster

    # Otherwise Ray replaces 127.0.0.1 by the machine's address.
    services.resolve_ip_for_localhost = lambda address, *_: address
    own = {"node_ip_address": "127.0.0.1", "num_cpus": 4, "object_store_memory": 1 << 30}
    head = {"include_dashboard": False, "resources": {NODES[0]: 4}, **own}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(resources={NODES[1]: 4}, **own)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    return cluster


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="folder of the data sets (default: $CNN2GNN_DATA)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=60, help="counted, per round")
    given = parser.parse_args()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="remote-") as name:
        work, data = Path(name), inputs.data_folder(given.data)
        token(work)
        jobs = [inputs.photos(data, work, 40), inputs.small(data, work, None)]
        cluster = two_nodes()
        try:
            turns = [(job, node) for _ in range(given.rounds) for job in jobs for node in NODES]
            for job, node in tqdm(turns, unit="turn"):
                found.setdefault((job.kind, node), []).append(read(job, node, given.batches))
        finally:
            import ray

            ray.shutdown()
            cluster.shutdown()
    print(
        table({key: found[key] for key in sorted(found, key=lambda k: (k[0], NODES.index(k[1])))})
    )


def token(work: Path) -> None:
    """Ray's servers ask for a token of this run's own."""
    (work / "token").write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(work / "token")}


if __name__ == "__main__":
    main()
