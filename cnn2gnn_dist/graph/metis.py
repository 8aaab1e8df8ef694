"""METIS through DGL, as a process of its own: ``python -m cnn2gnn_dist.graph.metis TABLE OUT PARTS``.

METIS keeps its random state for the life of a process: a second call on the same graph gives
other parts (66 of 300 nodes differed). A fresh process mends most of that, not all: of 12 runs
on one small graph 3 gave another partition, with address randomisation off none of 6 did. So
a version's parts are stored and reused, and ``graph.partitioner=ranges`` is there for runs
that must repeat to the bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from cnn2gnn_dist.compat import import_dgl


def main(table_path: Path, out_path: Path, parts: int) -> None:
    """Read a candidate table [N, M], write the part of each node [N] int32."""
    import torch

    table_NM = np.load(table_path)
    there = table_NM >= 0
    heads = np.repeat(np.arange(len(table_NM)), table_NM.shape[1])[there.ravel()]
    tails = table_NM[there].astype(np.int64)
    dgl = import_dgl()
    ends = torch.from_numpy(heads), torch.from_numpy(tails)
    graph = dgl.graph(ends, num_nodes=len(table_NM))
    np.save(out_path, dgl.metis_partition_assignment(graph, parts).numpy().astype(np.int32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
