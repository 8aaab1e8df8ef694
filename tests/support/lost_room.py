"""Work shared out on a Ray that loses its nodes with room one by one; a program, because a process has one Ray.

python -m tests.support.lost_room FOLDER    prints the results, and the error with which the work ends
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from cnn2gnn_dist.errors import UserError


def main(folder: Path) -> None:
    import ray
    import ray._private.services as services
    from ray.cluster_utils import Cluster

    from cnn2gnn_dist.runtime.ray import pool as ray_pool
    from tests.support.pool_work import endless

    class Patient(ray_pool._Calls):
        """Waits longer for the first actor: on a loaded machine a process takes that long to start."""

        def __init__(self, cpus: float, gpus: float) -> None:
            super().__init__(cpus, gpus)
            self._deadline += 170.0

    # Else Ray takes the machine's address for 127.0.0.1, where nothing listens.
    services.resolve_ip_for_localhost = lambda address, *_: address
    here = {"node_ip_address": "127.0.0.1"}
    head = {"num_cpus": 0, "include_dashboard": False, **here}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, **here) for _ in range(2)]
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    ray_pool.START_SECONDS = 10.0
    ray_pool._Calls = Patient  # type: ignore[misc]

    def work(item: int, how: int, **given: bool) -> None:
        losing = threading.Thread(target=lose_the_node_of, args=(folder / str(item), how))
        losing.start()
        arguments = {"notes": folder, **given}
        print(list(ray_pool.work_off([item], endless, arguments, actors=1)), flush=True)
        losing.join()

    try:
        # The node's processes end and its connections are refused, which the head learns later.
        work(1, signal.SIGKILL, once=True)
        # As if the host had no power: nobody there says any more, not even that it ends.
        work(2, signal.SIGSTOP)
    except UserError as error:
        print(error)
    finally:
        for raylet in raylets:
            if psutil.pid_exists(raylet):
                os.kill(raylet, signal.SIGKILL)  # its children end with it
        ray.shutdown()
        cluster.shutdown()


def lose_the_node_of(note: Path, how: int) -> None:
    """Send a signal to the node's raylet and to the process that has left this note there."""
    while not note.exists():
        time.sleep(0.1)
    process = psutil.Process(int(note.read_text()))
    for one in (process.parent(), process):
        one.send_signal(how)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
