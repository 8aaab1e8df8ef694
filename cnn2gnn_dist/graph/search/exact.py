"""The candidate table by exact search, in units that survive a kill: for small sets and GPUs."""

from __future__ import annotations

import numpy as np

from cnn2gnn_dist.graph.search.approximate import TableResult
from cnn2gnn_dist.graph.search.knn import Index
from cnn2gnn_dist.graph.search.work_units import WorkFolder, row_ranges

ROWS = 4096


def exact_table(
    work_folder: WorkFolder, z_Nd: np.ndarray, query_Nd: np.ndarray, m: int, device: str
) -> TableResult:
    """The m nearest other nodes of every node (collective).

    Args:
        work_folder: shares the rows among ranks.
        z_Nd: float32, the base rows.
        query_Nd: float32; ``query_Nd[i]`` is the query of node i.
        m: candidates per node.
        device: "cpu" (faiss) or "cuda" (blocked matmul and top-k).

    Raises:
        UserError: fewer than m other nodes.
    """
    index = Index(np.asarray(z_Nd), device=device)

    def search(unit: slice) -> tuple[np.ndarray]:
        rows = np.arange(unit.start, unit.stop)
        return (index.search(query_Nd[rows], m, exclude=rows)[0],)

    arrays = {"table-exact": ((len(z_Nd), m), np.int32)}
    (table_NM,) = work_folder.fill("exact", row_ranges(len(z_Nd), ROWS), arrays, search)
    return TableResult(table_NM, np.arange(len(z_Nd), dtype=np.int32), [1.0])
