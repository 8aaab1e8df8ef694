"""The candidate table of a graph version: the choice of search, its ranks, and the metadata it records."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cnn2gnn_dist import log
from cnn2gnn_dist.graph import quality
from cnn2gnn_dist.graph.partition.followers import Nearest
from cnn2gnn_dist.graph.search.approximate import RecallGoal, TableResult, TableSearch
from cnn2gnn_dist.graph.search.exact import ROWS, exact_table
from cnn2gnn_dist.graph.search.knn import Index
from cnn2gnn_dist.graph.search.valid_nodes import ValidNodes, valid_nodes_of
from cnn2gnn_dist.graph.search.work_units import RankGroup, WorkFolder, row_ranges
from cnn2gnn_dist.graph.version import WORK_FOLDER, GraphVersion, GraphWriter
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.shared_files import handover, host_folders
from cnn2gnn_dist.stages.shared.context import Context

LONG = 4
"""Minimum number of units of a phase for a progress bar."""
NEAREST = 8
"""Nodes among whose partitions an image without a label has the choice, if they aren't full."""


def open_work_folder(context: Context, writer: GraphWriter) -> WorkFolder:
    """Storage for intermediate results of a version that must survive a kill."""
    ranks = context.ranks
    group = RankGroup(
        ranks.rank,
        ranks.world_size,
        # On a GPU each thread would hold its own similarities there (``knn.DEVICE_CELLS``).
        1 if context.device == "cuda" else torch.get_num_threads(),
        collectives.uneven,
        collectives.all_gather_object,
        _Bar(context),
        handover.forget,
        host_folders.acts(ranks.rank),
        handover.share,
    )
    return WorkFolder(writer.path / WORK_FOLDER, group)


def find(
    context: Context,
    writer: GraphWriter,
    query_Nd: np.ndarray | None,
    previous: GraphVersion | None,
) -> dict[str, Any]:
    """Fill ``candidates`` and ``order`` of a version (collective); return metadata of the search.

    ``query_Nd``: the query of each node; None: its own z.
    """
    settings, work_folder = context.config.graph, open_work_folder(context, writer)
    z_Nd = writer.array("z")
    found = _search(context, work_folder, z_Nd, z_Nd if query_Nd is None else query_Nd, previous)

    def keep() -> dict[str, Any]:
        writer.rows("candidates", 0, found.table_NM)
        writer.rows("order", 0, found.order_N)
        writer.sync()
        note: dict[str, Any] = {
            "exact": settings.search.exact or context.device == "cuda",
            "rebuilt": found.rebuilt,
            "recall": found.history,
        }
        if previous is not None:
            note["changed_edges"] = quality.changed_edges(previous.candidates, found.table_NM)
        return note

    return host_folders.in_each(keep)  # each folder has the whole table


def nearest_nodes(context: Context, writer: GraphWriter, query_Nd: np.ndarray) -> Nearest:
    """Of each node the nearest ones that others may find, itself if it is such a node (collective).

    ``query_Nd`` holds z also of images without a label. One that could not be read (z = 0) gets the first nodes.
    """
    work_folder, settings = open_work_folder(context, writer), context.config.graph.search
    z_Nd = writer.array("z")
    nodes_A = valid_nodes_of(z_Nd)
    some = ValidNodes(work_folder, nodes_A, len(z_Nd))
    index = Index(
        some.rows("z", z_Nd), exact=settings.exact, probes=settings.probes, device=context.device
    )
    nodes_A1 = np.append(some.nodes_A, np.int32(-1))  # the last entry stands for the number -1
    width = min(NEAREST, len(nodes_A))

    def work(unit: slice) -> tuple[np.ndarray, np.ndarray]:
        nodes = np.arange(unit.start, unit.stop, dtype=np.int32)
        ids, similarity = (
            np.full((len(nodes), width), -1, np.int32),
            np.ones(len(nodes), np.float32),
        )
        ids[:, 0] = nodes
        rows = np.flatnonzero(some.place_N[unit] < 0)
        found, near = index.search(query_Nd[unit][rows], width)
        ids[rows], similarity[rows] = nodes_A1[found], near[:, 0]
        return ids, similarity

    count = len(z_Nd)
    shape = {"nearest": ((count, width), np.int32), "similarity": ((count,), np.float32)}
    return Nearest(*work_folder.fill("nearest", row_ranges(count, ROWS), shape, work))


def describe(note: dict[str, Any]) -> str:
    """Describe in a few words how a table was found."""
    if note["exact"]:
        how = "exact"
    else:
        steps = " > ".join(f"{recall:.3f}" for recall in note["recall"])
        how = f"{'built' if note['rebuilt'] else 'refreshed'}, recall {steps}"
    if "changed_edges" in note:
        how += f", {note['changed_edges']:.1%} of edges changed"
    return how


def _search(
    context: Context,
    work_folder: WorkFolder,
    z_Nd: np.ndarray,
    query_Nd: np.ndarray,
    previous: GraphVersion | None,
) -> TableResult:
    """Neighbors of all nodes except corrupt ones, whose rows are -1 and which appear in no other row."""
    nodes_A = valid_nodes_of(z_Nd) if query_Nd is z_Nd else valid_nodes_of(z_Nd, query_Nd)
    if len(nodes_A) == len(z_Nd):
        before = None
        if previous is not None:
            before = previous.candidates, np.asarray(previous.order)
        return _search_rows(context, work_folder, z_Nd, query_Nd, before)
    some = ValidNodes(work_folder, nodes_A, len(z_Nd))
    z_Ad = some.rows("z", z_Nd)
    query_Ad = z_Ad if query_Nd is z_Nd else some.rows("query", query_Nd)
    before = None
    if previous is not None:
        table_AM = some.table("before", previous.candidates)
        before = table_AM, some.order(np.asarray(previous.order))
    return some.whole(_search_rows(context, work_folder, z_Ad, query_Ad, before))


def _search_rows(
    context: Context,
    work_folder: WorkFolder,
    z_Nd: np.ndarray,
    query_Nd: np.ndarray,
    before: tuple[np.ndarray, np.ndarray] | None,
) -> TableResult:
    """The table of these rows; ``before``: an earlier table, and the order of its rows."""
    settings = context.config.graph
    if settings.search.exact or context.device == "cuda":
        return exact_table(work_folder, z_Nd, query_Nd, settings.candidates, context.device)
    search, goal = (
        TableSearch(work_folder, z_Nd, query_Nd, settings.candidates),
        RecallGoal(settings.search.recall),
    )
    if before is None or not settings.search.warm_start:
        return search.build(goal)
    return search.refresh(*before, goal)


class _Bar:
    """A progress bar for each phase with more than a few units, on rank 0."""

    def __init__(self, context: Context) -> None:
        self.shown = context.ranks.is_first
        self.bar: Any = None
        self.phase = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not self.shown or total < LONG:
            return
        if self.bar is None or self.phase != phase:
            self.phase = phase
            self.bar = log.progress(
                total=total, desc=phase, unit="unit", leave=False, initial=done - 1
            )
        self.bar.update(1)
        if done == total:
            self.bar.close()
            self.bar = None
