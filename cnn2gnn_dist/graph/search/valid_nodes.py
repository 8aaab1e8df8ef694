"""Search restricted to some nodes: corrupt images (z = 0) are no node's neighbors and have none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cnn2gnn_dist.graph.search.approximate import TableResult
from cnn2gnn_dist.graph.search.work_units import WorkFolder, row_ranges

ROWS = 65_536


def valid_nodes_of(*z_Nd: np.ndarray) -> np.ndarray:
    """Nodes, ascending, whose rows are nonzero in all of the arrays."""
    found = np.ones(len(z_Nd[0]), bool)
    for z in z_Nd:
        for span in row_ranges(len(z), ROWS):
            found[span] &= np.asarray(z[span]).any(1)
    return np.flatnonzero(found)


class ValidNodes:
    """The rows of the given nodes, compacted: numbering from 0 (A), and back (N).

    Args:
        work_folder: where the arrays are stored.
        nodes_A: ascending; nodes: N.
    """

    def __init__(self, work_folder: WorkFolder, nodes_A: np.ndarray, nodes: int) -> None:
        self.work_folder, self.nodes_A, self.nodes = work_folder, nodes_A.astype(np.int32), nodes
        self.place_N = np.full(nodes + 1, -1, np.int32)  # the last entry stands for the id -1
        self.place_N[nodes_A] = np.arange(len(nodes_A), dtype=np.int32)

    def rows(self, name: str, array_Nd: np.ndarray) -> np.ndarray:
        """float32 [A, d] (collective)."""
        return self._filled(name, array_Nd.shape[1], np.float32, lambda own: array_Nd[own])

    def table(self, name: str, table_NM: np.ndarray) -> np.ndarray:
        """Convert a table of node ids [N, M] to compact numbers [A, M]; other ids become -1 (collective)."""
        return self._filled(
            name, table_NM.shape[1], np.int32, lambda own: self.place_N[table_NM[own]]
        )

    def order(self, order_N: np.ndarray) -> np.ndarray:
        """Convert an order of nodes [N] to compact numbers [A]."""
        place = self.place_N[order_N]
        return place[place >= 0]

    def whole(self, found: TableResult) -> TableResult:
        """Convert a result from compact numbers to node ids; rows of -1 for all other nodes (collective)."""
        nodes_A1 = np.append(self.nodes_A, np.int32(-1))

        def work(unit: slice) -> tuple[np.ndarray]:
            place = self.place_N[unit]
            rows = nodes_A1[found.table_NM[np.maximum(place, 0)]]
            rows[place < 0] = -1
            return (rows,)

        shape = {"table-whole": ((self.nodes, found.table_NM.shape[1]), np.int32)}
        (table_NM,) = self.work_folder.fill("whole", row_ranges(self.nodes, ROWS), shape, work)
        others = np.flatnonzero(self.place_N[:-1] < 0).astype(np.int32)
        order_N = np.concatenate([self.nodes_A[found.order_N], others])
        return TableResult(table_NM, order_N, found.history, found.rebuilt)

    def _filled(
        self, name: str, width: int, kind: type, rows_of: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        shape = {f"alive-{name}": ((len(self.nodes_A), width), kind)}
        units = row_ranges(len(self.nodes_A), ROWS)
        (made,) = self.work_folder.fill(
            f"alive-{name}", units, shape, lambda unit: (rows_of(self.nodes_A[unit]),)
        )
        return made
