"""METIS through DGL, in a separate process: ``python -m cnn2gnn_dist.graph.metis TABLE OUT PARTS``.

METIS keeps its random state for the lifetime of a process: a second call on the same graph gives
different partitions (66 of 300 nodes differed). Something in it also depends on addresses: of 30
small graphs, 3 got different partitions in some of 8 fresh processes, with or without address
randomization, whenever the environment (and with it the stack) differed; with a fixed environment
and no randomization, none did. So this process re-executes itself without randomization, and
``partition.assign`` gives it a fixed environment and fixed arguments. Where the kernel refuses
(some containers), the partitions are nearly always the same; with
``graph.partition.partitioner=ranges`` they always are.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

ADDR_NO_RANDOMIZE = 0x0040000
ASK = 0xFFFFFFFF


def without_randomisation() -> None:
    """Re-execute this process at fixed addresses, unless it already is or the kernel refuses."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    now = libc.personality(ASK)
    if now == -1 or now & ADDR_NO_RANDOMIZE or libc.personality(now | ADDR_NO_RANDOMIZE) == -1:
        return
    os.execv(sys.executable, [sys.executable, "-m", "cnn2gnn_dist.graph.metis", *sys.argv[1:]])


def main(table_path: Path, out_path: Path, parts: int) -> None:
    """Read a candidate table [N, M], write the partition of each node [N] int32."""
    import numpy as np
    import torch

    from cnn2gnn_dist import durable
    from cnn2gnn_dist.compat import import_dgl

    dgl = import_dgl()
    low, high = (torch.from_numpy(ends) for ends in _pairs(np.load(table_path, mmap_mode="r")))
    graph = dgl.graph((low, high), num_nodes=len(np.load(table_path, mmap_mode="r")))
    del low, high
    part_N = dgl.metis_partition_assignment(graph, parts).numpy().astype(np.int32)
    durable.write_array(out_path, part_N)


def _pairs(table_NM: Any) -> tuple[Any, Any]:
    """Both ends of each undirected edge once (METIS would store mutual edges twice), in little memory."""
    import numpy as np

    nodes = np.int64(len(table_NM))
    keys = table_NM.astype(np.int64).ravel()
    own = np.repeat(np.arange(nodes, dtype=np.int32), table_NM.shape[1])
    missing = keys < 0
    high = np.maximum(keys, own)
    np.minimum(keys, own, out=keys)
    keys *= nodes
    keys += high
    del high, own
    keys[missing] = -1
    del missing
    keys.sort()
    first = np.empty(len(keys), bool)
    first[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    first &= keys >= 0
    keys = keys[first]
    low = keys // nodes
    keys -= low * nodes
    return low, keys


if __name__ == "__main__":
    without_randomisation()
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
