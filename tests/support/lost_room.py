"""Work shared out on a Ray whose only node with room is lost; a program, because a process has one Ray.

python -m tests.support.lost_room FOLDER    prints the error with which the work ends
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from cnn2gnn_dist.errors import UserError


def main(folder: Path) -> None:
    import ray
    import ray._private.services as services
    from ray.cluster_utils import Cluster

    from cnn2gnn_dist.runtime.ray import pool as ray_pool
    from tests.support.pool_work import endless

    # Else Ray takes the machine's address for 127.0.0.1, where nothing listens.
    services.resolve_ip_for_localhost = lambda address, *_: address
    here = {"node_ip_address": "127.0.0.1"}
    head = {"num_cpus": 0, "include_dashboard": False, **here}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=1, **here)
    raylet = node.all_processes["raylet"][0].process.pid
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)

    def lose_it() -> None:
        while not (note := folder / "1").exists():
            time.sleep(0.1)
        # As if the host had no power: nobody there says any more, not even that it ends.
        for process in (raylet, int(note.read_text())):
            os.kill(process, signal.SIGSTOP)

    threading.Thread(target=lose_it, daemon=True).start()
    ray_pool.START_SECONDS = 10.0
    try:
        list(ray_pool.work_off([1], endless, {"notes": folder}, actors=1))
    except UserError as error:
        print(error)
    finally:
        os.kill(raylet, signal.SIGKILL)  # its children end with it
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
