"""One partition's DistDGL server: ``python -m cnn2gnn_dist.graph.distdgl.server TASK``.

It writes its partition in DGL's format and serves it; every server writes only its own and needs no
other. Nodes are renumbered partition by partition (``partition.new_ids``). Edge ids leave room for
every cell of the candidate table: edge new_id·M + column.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.compat import import_dgl
from cnn2gnn_dist.graph.distdgl.served import GRAPH_NAME, Task
from cnn2gnn_dist.graph.version import GraphVersion, load_part, open_version

NODES, EDGES = "_N", "_N:_E:_N"


def node_ranges(part_N: np.ndarray, parts: int) -> np.ndarray:
    """[P, 2] first new id of each partition, and the id after its last."""
    ends = np.cumsum(np.bincount(part_N, minlength=parts))
    return np.stack([np.append(0, ends[:-1]), ends], 1)


def write(task: Task, version: GraphVersion) -> None:
    """Write the partition for DGL."""
    import torch

    dgl = import_dgl()
    folder, parts = Path(task.folder), len(task.addresses)
    graph, width = load_part(version, task.part), version.candidates.shape[1]
    ranges = node_ranges(np.asarray(version.part), parts)
    start = int(ranges[task.part, 0])
    table = np.asarray(graph.table_KM[: graph.num_inner])
    heads, columns = np.nonzero(table >= 0)
    tails = table[heads, columns].astype(np.int64)
    held = np.asarray(graph.nodes_L[: graph.num_inner + graph.num_halo1])
    made = dgl.graph((torch.from_numpy(tails), torch.from_numpy(heads)), num_nodes=len(held))
    made.ndata[dgl.NID] = torch.from_numpy(new_of_old(np.asarray(version.part))[held])
    made.ndata["inner_node"] = (torch.arange(len(held)) < graph.num_inner).to(torch.uint8)
    made.edata[dgl.EID] = torch.from_numpy((start + heads) * width + columns)
    made.edata["inner_edge"] = torch.ones(len(heads), dtype=torch.uint8)
    dgl.save_graphs(str(folder / "graph.dgl"), [made])
    for name in ("nodes.dgl", "edges.dgl"):
        dgl.data.utils.save_tensors(str(folder / name), {})
    task.config.write_text(json.dumps(_description(ranges, width, task.part)), encoding="utf-8")


def new_of_old(part_N: np.ndarray) -> np.ndarray:
    """New id [N] of each old id (the inverse of ``partition.new_ids``)."""
    from cnn2gnn_dist.graph.partition.parts import new_ids

    new = np.empty(len(part_N), np.int64)
    new[new_ids(part_N)] = np.arange(len(part_N))
    return new


def _description(ranges: np.ndarray, width: int, part: int) -> dict[str, Any]:
    nodes = int(ranges[-1, 1])
    files = {"part_graph": "graph.dgl", "node_feats": "nodes.dgl", "edge_feats": "edges.dgl"}
    return {
        "graph_name": GRAPH_NAME,
        "num_nodes": nodes,
        "num_edges": nodes * width,
        "num_parts": len(ranges),
        "node_map": {NODES: ranges.tolist()},
        "edge_map": {EDGES: (ranges * width).tolist()},
        "ntypes": {NODES: 0},
        "etypes": {EDGES: 0},
        f"part-{part}": files,
    }


def main(task: Task) -> None:
    """Write the partition, and serve it until killed."""
    write(task, open_version(Path(task.version)))
    dgl = import_dgl()
    dgl.seed(task.seed & 0x7FFFFFFF)
    dgl.distributed.initialize(str(task.ip_config))


if __name__ == "__main__":
    main(Task.from_argument(sys.argv[1]))
