"""The candidate table of all nodes: built from coarse lists or from the previous table, on disk.

Both end in rounds of ``nn_descent.joined`` until a sample's recall is good enough. Work is done in
units shared by ranks; it resumes where a kill left it and gives the same table for any number of
ranks. z may be memory-mapped: in addition to it, a rank holds only the rows of one unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from cnn2gnn_dist.graph.search import ivf, nn_descent
from cnn2gnn_dist.graph.search.nn_descent import Width
from cnn2gnn_dist.graph.search.work_units import WorkFolder, row_ranges

MOST_PROBES = 16
SCAN_ROWS, JOIN_ROWS, PROBE_ROWS = 131_072, 65_536, 65_536
SAMPLE, SAMPLE_UNIT, BASE_ROWS = 256, 32, 262_144
RECALL_AT = 10
HOPELESS, REFRESH_ROUNDS = 0.8, 3
"""Stale recall below which, and rounds after which, rebuilding is cheaper (docs/scale.md)."""


@dataclass(frozen=True)
class RecallGoal:
    """When a table is good enough: recall@10 (@M if M is less) of a sample, or after ``rounds`` joins."""

    recall: float = 0.95
    rounds: int = 6


@dataclass
class TableResult:
    """A table and how it was found.

    Attributes:
        table_NM: int32 [N, M] candidates, nearest first, -1 = none; on disk.
        order_N: int32 [N], similar nodes next to each other: the order in which units run.
        history: recall@10 of the sample at the start and after each round.
        rebuilt: False: derived from the previous table.
    """

    table_NM: np.ndarray
    order_N: np.ndarray
    history: list[float] = field(default_factory=list)
    rebuilt: bool = True


class TableSearch:
    """Nearest neighbors of all nodes among all nodes.

    Args:
        work_folder: the folder and the ranks.
        z_Nd: float32 base; ``query_Nd``: the query of node i (z itself, or another view of it).
        m: candidates per node, fewer than N.
    """

    def __init__(
        self, work_folder: WorkFolder, z_Nd: np.ndarray, query_Nd: np.ndarray, m: int
    ) -> None:
        self.work_folder, self.z_Nd, self.query_Nd, self.m = work_folder, z_Nd, query_Nd, m
        self.nodes = len(z_Nd)
        rng = np.random.default_rng(ivf.SEED)
        self._sample_S = np.sort(rng.choice(self.nodes, min(SAMPLE, self.nodes), replace=False))
        self._truth_SR: tuple[np.ndarray, np.ndarray] | None = None

    def build(self, goal: RecallGoal) -> TableResult:
        """Build the table from z alone (collective)."""
        order_N, start_L1, probe_NP = self._in_lists(goal)

        def scan(unit: slice) -> np.ndarray:
            rows = order_N[unit]
            return ivf.scan(
                self.query_Nd[rows], rows, probe_NP[rows], self.z_Nd, order_N, start_L1,
                self.m, self.m,
            )  # fmt: skip

        table_NM = self._in_order("scan", "scan", SCAN_ROWS, order_N, scan)
        return self._improve(TableResult(table_NM, order_N), goal, "build")

    def refresh(self, before_NM: np.ndarray, order_N: np.ndarray, goal: RecallGoal) -> TableResult:
        """Build from the table of an earlier z; rebuild where that does not reach the goal (collective)."""
        stale = self.recall(before_NM)
        if stale >= HOPELESS:
            few = replace(goal, rounds=min(goal.rounds, REFRESH_ROUNDS))
            found = self._improve(TableResult(before_NM, order_N, rebuilt=False), few, "refresh")
            if found.history[-1] >= goal.recall:
                return found
        found = self.build(goal)
        found.history.insert(0, stale)
        return found

    def recall(self, table_NM: np.ndarray) -> float:
        """Fraction of a sample's ``RECALL_AT`` nearest nodes that the table has; ties count (collective)."""
        truth_SR, rows = self._truth()[0], self._sample_S
        near_SM = nn_descent.similarities(table_NM[rows], self.z_Nd, self.query_Nd[rows])
        # By similarity, not by id: among equally near nodes any is correct.
        bar_S1 = truth_SR[:, -1:] - 1e-6
        hits = np.minimum((near_SM >= bar_S1).sum(1), truth_SR.shape[1])
        return float(hits.sum() / truth_SR.size)

    def _improve(self, found: TableResult, goal: RecallGoal, name: str) -> TableResult:
        """Run rounds of neighbors of neighbors until the goal is reached or nothing more is gained."""
        half, allowed = max(self.m // 2, 2), 1 - goal.recall
        widths = [
            Width(half // 2, half // 2, half),
            Width(half, half, half),
            Width(self.m, half, self.m),
        ]
        found.history.append(self.recall(found.table_NM))
        level = 0
        for number in range(goal.rounds):
            missing = 1 - found.history[-1]
            if missing <= allowed:
                break
            if missing > 2 * allowed:  # a narrow round halves the missing fraction at half the cost
                level = max(level, 1)
            found.table_NM = self._round(found, f"{name}-{number}", widths[level])
            found.history.append(self.recall(found.table_NM))
            if 1 - found.history[-1] > 0.7 * missing:
                level += 1
            if level == len(widths):
                break
        return found

    def _round(self, found: TableResult, name: str, width: Width) -> np.ndarray:
        before_NM, order_N = found.table_NM, found.order_N
        (reverse_NR,) = self.work_folder.fill(
            f"reverse-{name}",
            row_ranges(self.nodes, nn_descent.TARGETS),
            {f"reverse-{name}": ((self.nodes, width.backward), np.int32)},
            lambda unit: (nn_descent.reverse(before_NM, unit, width.backward),),
        )

        def join(unit: slice) -> np.ndarray:
            return nn_descent.joined(
                before_NM, reverse_NR, self.z_Nd, self.query_Nd, order_N[unit], width
            )

        return self._in_order(f"join-{name}", name, JOIN_ROWS, order_N, join)

    def _in_order(
        self,
        phase: str,
        name: str,
        size: int,
        order_N: np.ndarray,
        work: Callable[[slice], np.ndarray],
    ) -> np.ndarray:
        """The table [N, M] by node, whose rows ``work`` makes in another order, similar nodes together.

        Rows are first written in that order, then each to its node: a unit's rows are always
        contiguous in the file, so that ranks don't write into each other's pages.
        """
        shape = {f"placed-{name}": ((self.nodes, self.m), np.int32)}
        (placed_NM,) = self.work_folder.fill(
            phase, row_ranges(self.nodes, size), shape, lambda unit: (work(unit),)
        )
        place_N = np.empty(self.nodes, np.int32)
        place_N[order_N] = np.arange(self.nodes, dtype=np.int32)
        (table_NM,) = self.work_folder.fill(
            f"table-{name}",
            row_ranges(self.nodes, size),
            {f"table-{name}": ((self.nodes, self.m), np.int32)},
            lambda unit: (placed_NM[place_N[unit]],),
        )
        return table_NM

    def _in_lists(self, goal: RecallGoal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nodes by list [N], the start of each list [L + 1], and the lists of each query [N, P]."""
        count = ivf.number_of_lists(self.nodes)
        (centroids_Ld,) = self.work_folder.fill(
            "centroids",
            [slice(0, count)],
            {"centroids": ((count, self.z_Nd.shape[1]), np.float32)},
            lambda unit: (ivf.train(self.z_Nd, count),),
        )
        probes = self._probes_for(goal, centroids_Ld)

        def probe(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            asked_QP = ivf.nearest_lists(self.query_Nd[rows], centroids_Ld, probes)
            if self.query_Nd is self.z_Nd:
                return asked_QP[:, 0], asked_QP
            return ivf.nearest_lists(self.z_Nd[rows], centroids_Ld, 1)[:, 0], asked_QP

        arrays = {"home": ((self.nodes,), np.int32), "probe": ((self.nodes, probes), np.int32)}
        home_N, probe_NP = self.work_folder.fill(
            "probe", row_ranges(self.nodes, PROBE_ROWS), arrays, probe
        )
        order_N = np.argsort(home_N, kind="stable").astype(np.int32)
        return order_N, np.searchsorted(home_N[order_N], np.arange(count + 1)), probe_NP

    def _probes_for(self, goal: RecallGoal, centroids_Ld: np.ndarray) -> int:
        """The smallest number of lists that contain the sample's nearest nodes as often as the goal requires.

        Joins are slow to find what the lists miss (a complete neighborhood across a border).
        """
        most = min(MOST_PROBES, len(centroids_Ld))
        near_SR = self._truth()[1]
        home_SR = ivf.nearest_lists(self.z_Nd[near_SR.ravel()], centroids_Ld, 1)
        asked_SP = ivf.nearest_lists(self.query_Nd[self._sample_S], centroids_Ld, most)
        held_SRP = home_SR.reshape(near_SR.shape)[:, :, None] == asked_SP[:, None, :]
        recall_P = held_SRP.mean((0, 1)).cumsum()
        return min(int((recall_P < goal.recall).sum()) + 1, most)

    def _truth(self) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and ids [S, R] of the sample's nearest nodes (collective)."""
        if self._truth_SR is None:
            self._truth_SR = self._exact_sample()
        return self._truth_SR

    def _exact_sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and ids [S, R] of the sample's nearest nodes, excluding itself, nearest first."""
        import faiss

        wanted = min(RECALL_AT, self.m, self.nodes - 1)
        shape = len(self._sample_S), wanted

        def exact(unit: slice) -> tuple[np.ndarray, np.ndarray]:
            rows = self._sample_S[unit]
            keys = np.empty((len(rows), 0), np.int64)
            for span in row_ranges(self.nodes, BASE_ROWS):
                base = np.ascontiguousarray(self.z_Nd[span], np.float32)
                near, ids = faiss.knn(
                    np.ascontiguousarray(self.query_Nd[rows], np.float32), base,
                    min(wanted + 1, len(base)), metric=faiss.METRIC_INNER_PRODUCT,
                )  # fmt: skip
                ids += span.start
                ids[ids == rows[:, None]] = -1
                keys = np.concatenate([keys, nn_descent.sort_keys(near, ids)], axis=1)
            best = nn_descent.ids_of(np.sort(keys, axis=1)[:, :wanted])
            near = nn_descent.similarities(best, self.z_Nd, self.query_Nd[rows])
            return -np.sort(-near, axis=1), best

        arrays = {"sample": (shape, np.float32), "sample-ids": (shape, np.int32)}
        truth_SR, near_SR = self.work_folder.fill(
            "sample", row_ranges(len(self._sample_S), SAMPLE_UNIT), arrays, exact
        )
        return truth_SR, near_SR
