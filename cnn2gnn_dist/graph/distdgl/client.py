"""One rank's DistDGL client: ``python -m cnn2gnn_dist.graph.distdgl.client TASK LINE``.

It fills the bank's DistTensors with its partition's rows, reports that it is ready, and answers
requests over a private socket (the file descriptor LINE) until that closes.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnn2gnn_dist.compat import import_dgl
from cnn2gnn_dist.graph.distdgl.served import GRAPH_NAME, Task
from cnn2gnn_dist.graph.distdgl.server import NODES, new_of_old, node_ranges
from cnn2gnn_dist.graph.partition.parts import new_ids
from cnn2gnn_dist.graph.version import GraphVersion, open_version

KINDS = {"x": torch.float16, "z": torch.float32, "labels": torch.int32}


class Client:
    """DGL's client of one machine; callers pass and get ids of the graph version."""

    def __init__(self, task: Task) -> None:
        self._dgl = _connected(task)
        version = open_version(Path(task.version))
        part_N = np.asarray(version.part)
        self._old_of_new, self._new_of_old = new_ids(part_N), new_of_old(part_N)
        self._width = version.candidates.shape[1]
        self._graph = self._dgl.distributed.DistGraph(GRAPH_NAME)
        start, end = node_ranges(part_N, len(task.addresses))[task.part]
        self._bank = {name: self._filled(version, name, start, end) for name in KINDS}
        self._graph.barrier()

    def neighbours(self, nodes_Q: np.ndarray, fanout: int, key: int) -> np.ndarray:
        """[Q, fanout] sampled candidates of distinct nodes, in table order; -1 = none."""
        fanout = min(fanout, self._width)
        made = np.full((len(nodes_Q), fanout), -1, np.int64)
        if not len(nodes_Q):
            return made
        self._dgl.seed(key)
        new_Q = self._new_of_old[nodes_Q]
        found = self._dgl.distributed.sample_neighbors(self._graph, torch.from_numpy(new_Q), fanout)
        edges = found.edata[self._dgl.EID].numpy()
        order = np.argsort(edges)
        tails, heads = found.edges()[0].numpy()[order], edges[order] // self._width
        by_head = np.argsort(new_Q)
        row = by_head[np.searchsorted(new_Q, heads, sorter=by_head)]
        column = np.arange(len(heads)) - np.searchsorted(heads, heads, side="left")
        made[row, column] = self._old_of_new[tails]
        return made

    def rows(self, nodes_V: np.ndarray) -> tuple[np.ndarray, ...]:
        """x [V, D], z [V, d] and labels [V] of nodes."""
        new_V = torch.from_numpy(self._new_of_old[nodes_V])
        return tuple(self._bank[name][new_V].numpy() for name in KINDS)

    def _filled(self, version: GraphVersion, name: str, start: int, end: int) -> Any:
        """A DistTensor of the version's array, with the rows of this partition filled in."""
        array = getattr(version, name)
        policy = self._graph.get_node_partition_policy(NODES)
        tensor = self._dgl.distributed.DistTensor(
            array.shape, KINDS[name], name=f"bank-{name}", part_policy=policy
        )
        own = np.ascontiguousarray(array[self._old_of_new[start:end]])
        tensor[torch.arange(start, end)] = torch.from_numpy(own)
        return tensor


def _connected(task: Task) -> Any:
    """Return DGL, connected to all servers from this machine's address only."""
    dgl = import_dgl()
    address = task.addresses[task.part][0]

    def free_address(_server: str) -> str:
        # DGL's own version briefly listens on all interfaces to find a free port.
        with socket.socket() as found:
            found.bind((address, 0))
            return f"{address}:{found.getsockname()[1]}"

    client: Any = dgl.distributed.rpc_client
    client.get_local_usable_addr = free_address
    # DGL's own version looks at network interfaces, which machines on one host share.
    client.get_local_machine_id = lambda _servers: task.part
    dgl.distributed.initialize(str(task.ip_config))
    return dgl


def main(task: Task, line: Connection) -> None:
    """Answer requests until the rank closes the socket."""
    client = Client(task)
    line.send(("value", None))
    while True:
        name, *arguments = line.recv()
        line.send(("value", getattr(client, name)(*arguments)))


if __name__ == "__main__":
    line = Connection(int(sys.argv[2]))
    try:
        main(Task.from_argument(sys.argv[1]), line)
    except EOFError:
        code = 0
    except BaseException as error:
        traceback.print_exc()
        line.send(("error", repr(error)))
        code = 1
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)  # a normal exit would wait for all other clients
