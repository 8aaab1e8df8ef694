"""Stage ``graph``: embeddings → nearest neighbors → DGL partitions, as one version on disk.

The student stage builds such a version at every refresh; the ``graph`` stage builds the last one,
from the trained student: the bank that unseen images attach to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist import log
from cnn2gnn_dist.config import GraphConfig
from cnn2gnn_dist.data.batch_sizes import parts_of_rank
from cnn2gnn_dist.data.images.views import CLEAN
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.order import sequential
from cnn2gnn_dist.data.reading.reader import Request
from cnn2gnn_dist.graph import duplicates, quality, version
from cnn2gnn_dist.graph.partition import fennel, followers
from cnn2gnn_dist.graph.partition import parts as partition
from cnn2gnn_dist.graph.partition.followers import Nearest
from cnn2gnn_dist.graph.search.valid_nodes import valid_nodes_of
from cnn2gnn_dist.graph.version import GraphVersion, GraphWriter
from cnn2gnn_dist.runtime.group import collectives, exchange, members
from cnn2gnn_dist.runtime.shared_files import handover, host_folders
from cnn2gnn_dist.stages.neighbours import candidates
from cnn2gnn_dist.stages.neighbours.embeddings import NOTE, Embedded
from cnn2gnn_dist.stages.neighbours.neighbourhood import opened
from cnn2gnn_dist.stages.shared.context import Context, CorruptCount, load_manifest
from cnn2gnn_dist.stages.shared.networks import build_student, load_model

Embed = Callable[[Tensor], tuple[Tensor, Tensor]]
"""images uint8 [B, H, W, 3] → x_BD, z_Bd."""

ROWS_FORMAT = 2
"""Format of the files that an attempt leaves behind; an attempt with another format is not resumed."""
LONG = 200
"""Minimum number of batches for a progress bar."""
QUERY_VIEW = 1_000_000
"""First view number of the query side of a table: no training epoch uses it."""


def run(context: Context) -> list[Path]:
    """Build the final graph; return its files."""
    config = context.config
    manifest = load_manifest(context.paths.train_manifest)
    model = build_student(config, manifest.num_classes, "dataset", initial=False)
    load_model(model, context.paths.root, "student")
    model.compute_dtype = context.compute_dtype("student")
    model.to(context.device).eval()
    made = build(context, model.embed, context.folder, config.student.epochs, None, "last")
    context.say(describe(made.meta), stage="graph")
    return [path for path in sorted(made.path.rglob("*")) if path.is_file()]


def describe(meta: dict[str, Any]) -> str:
    """Describe a graph version in one line."""
    return (
        f"{meta['nodes']} nodes, M={meta['candidates']}, {candidates.describe(meta['search'])}, "
        f"homophily {meta['homophily']:.3f}, "
        f"cut {meta['cut']:.3f}, parts {meta['inner']}, halos {meta['halo']}, "
        f"in-degree {meta['degree']['min']}..{meta['degree']['max']}{_of_twins(meta)}"
    )


def _of_twins(meta: dict[str, Any]) -> str:
    """How many images have twins, which are not their neighbors in training; "" if none."""
    twins = meta["search"].get("twins", {"nodes": 0})
    if not twins["nodes"]:
        return ""
    return f", {twins['nodes']} images equal others (at most {twins['most']} one another)"


@torch.no_grad()
def build(
    context: Context,
    embed: Embed,
    root: Path,
    number: int,
    previous: GraphVersion | None,
    moment: str = "",
) -> GraphVersion:
    """Embed, search, partition, write (collective).

    The search starts from the candidates of ``previous``, whose node → partition map is kept while
    its edge cut stays low enough, so that features and order keep their places; images without a label, which have no
    edges, are assigned anew if seeds search live. ``moment`` identifies the weights that embed, and is recorded: an
    attempt interrupted by a kill is resumed if it has the same ``moment``.

    Raises:
        UserError: the disk is full; the complete versions stay as they are.
    """
    settings = context.config.graph
    manifest = load_manifest(context.paths.train_manifest)

    attempt = _attempt(context, moment) if moment else ""
    host_folders.in_each(lambda: _create(context, root, number, manifest, attempt))
    writer = GraphWriter.open(root, number)
    if not host_folders.are_separate():
        handover.hand_over(
            writer.path,
            lambda: handover.described(
                writer.path, {path.name: False for path in writer.path.glob("*.npy")}
            ),
        )
    query_Nd = _embed_all(context, embed, writer, manifest, number)
    by_table = settings.sampling.query == "table"
    searched = candidates.find(context, writer, query_Nd if by_table else None, previous)
    nearest = None
    if query_Nd is not None and not by_table:
        nearest = candidates.nearest_nodes(context, writer, query_Nd)

    def assign() -> float:
        table_NM, order_N = (np.asarray(writer.array(name)) for name in ("candidates", "order"))
        part_N, cut = _parts(table_NM, order_N, nearest, settings, previous)
        writer.rows("part", 0, part_N)
        twin_N = _twins(writer, manifest)
        writer.rows("twin", 0, twin_N)
        writer.sync()
        searched["twins"] = duplicates.summary(twin_N)
        return cut

    cut = collectives.alone(assign)
    sizes = _cut_parts(context, writer)

    def close() -> None:
        if context.ranks.is_first:
            _finalise(context, writer, sizes, cut, searched, previous, moment)
        else:  # of a folder of another host, to which the rest is handed over
            writer.place()

    host_folders.in_each(close)
    made = opened(version.version_path(root, number))
    host_folders.in_each(lambda: version.prune(root, made.path, settings.keep_versions))
    return made


def _attempt(context: Context, moment: str) -> str:
    """Describe all that the rows of an unfinished version depend on, and how they are divided among ranks.

    Neither the batch nor what ``precision=auto`` means here is in the stage's key.
    """
    return (
        f"{context.key} {moment} {context.ranks.world_size} ranks {ROWS_FORMAT}, batches of "
        f"{context.config.evaluate.batch} in {context.compute_dtype('student')}"
    )


def _create(context: Context, root: Path, number: int, manifest: Manifest, attempt: str) -> None:
    """Reserve the version's files, and write the labels."""
    settings, nodes = context.config.graph, len(manifest)
    shapes = {
        "x": ((nodes, context.config.student.dim), np.float16),
        "z": ((nodes, settings.dim), np.float32),
        "labels": ((nodes,), np.int32),
        "candidates": ((nodes, settings.candidates), np.int32),
        "order": ((nodes,), np.int32),
        "part": ((nodes,), np.int32),
        "twin": ((nodes,), np.int32),
    }
    made = GraphWriter.create(root, number, shapes, attempt)
    made.rows("labels", 0, manifest.label_N)
    made.sync()


def _embed_all(
    context: Context, embed: Embed, writer: GraphWriter, manifest: Manifest, number: int
) -> np.ndarray | None:
    """Write x and z of this rank's share; return the query side of a search [N, d], if any.

    With ``graph.sampling.query=table`` candidates are looked up for an augmented view: if found for the clean view,
    whose features are in the bank, they leak. Otherwise it is there if images without a label, whose z is not in the
    bank, must find a partition.
    """
    ranks, settings, samples = context.ranks, context.config.graph, len(manifest)
    work_folder = candidates.open_work_folder(context, writer)
    batch = context.config.evaluate.batch
    plan = list(sequential(samples, batch, ranks.rank, ranks.world_size))
    both = settings.sampling.query == "table"
    asks = both or (settings.partition.parts > 1 and bool((np.asarray(manifest.label_N) < 0).any()))
    made = Embedded(writer, work_folder, samples, batch, settings.dim if asks else 0)
    done = made.batches_done
    corrupt = CorruptCount(context.config.data.max_corrupt, samples, what="training images")
    with context.stream(context.paths.train_manifest, "embed") as stream:
        views = [CLEAN, QUERY_VIEW + number] if both else [CLEAN]
        requests = (Request(ids, view) for ids, _ in plan[done:] for view in views)
        batches = stream.batches(requests)
        hidden = not ranks.is_first or len(plan) < LONG
        for step in log.progress(
            range(done, len(plan)), "embed", unit="batch", leave=False, disable=hidden
        ):
            ids, mask = plan[step]
            for view in views:
                got = next(batches)
                corrupt.note(got)
                images, labels, valid = context.to_device(got)
                x_BD, z_Bd = embed(images)
                # Neither a corrupt image nor one without a label (data.unlabelled) is a node's
                # neighbor: its z is far from every unit vector.
                asked_Bd = z_Bd.float() * valid[:, None]
                z_Bd = asked_Bd * (labels >= 0)[:, None]
                if view == CLEAN and mask.any():
                    made.write("x", int(ids[0]), x_BD.half().cpu().numpy()[mask])
                    made.write("z", int(ids[0]), z_Bd.cpu().numpy()[mask])
            if asks and mask.any():
                query_Bd = z_Bd if both else asked_Bd
                made.write("query", int(ids[0]), query_Bd.cpu().numpy()[mask])
            if (step + 1) % NOTE == 0 or step + 1 == len(plan):
                made.note()
    made.close()
    if ranks.is_first and done:  # including those found by an earlier attempt
        labelled = np.flatnonzero(np.asarray(manifest.label_N) >= 0)
        for sample in np.setdiff1d(labelled, valid_nodes_of(writer.array("z"))).tolist():
            corrupt.seen.setdefault(sample, f"{manifest.key(sample)}: could not be read")
    corrupt.check()
    return made.array("query") if asks else None


def _twins(writer: GraphWriter, manifest: Manifest) -> np.ndarray:
    """int32 [N]: which nodes are the same image, by their bytes or by their features."""
    z_Nd, files = writer.array("z"), None
    if manifest.crc_N is not None:
        files = manifest.crc_N.astype(np.int64) << 31 ^ manifest.size_N.astype(np.int64)
    corrupt = np.ones(len(z_Nd), bool)
    corrupt[valid_nodes_of(z_Nd)] = False  # all such rows are equal: the images were not read
    return duplicates.groups(duplicates.row_keys(writer.array("x")), files, apart=corrupt)


def _parts(
    table_NM: np.ndarray,
    order_N: np.ndarray,
    nearest: Nearest | None,
    settings: GraphConfig,
    previous: GraphVersion | None,
) -> tuple[np.ndarray, float]:
    """Partition of each node, and the edge cut when partitions were last computed from scratch.

    ``nearest``: the nearest nodes that have candidates, of those first the node itself; None: all have some. The
    others are no node's candidates either, so that no edge decides where they belong: they go where the nearest is, in
    whose partition they search, while there is room; the partitioner sees and balances only the nodes with edges.
    """
    before = None
    if previous is not None:
        before = np.asarray(previous.part), float(previous.meta["cut_when_assigned"])
    if nearest is None:
        return _assigned(table_NM, order_N, settings, before)
    nodes = len(table_NM)
    nodes_A = np.flatnonzero(nearest.ids_NK[:, 0] == np.arange(nodes))
    place_N = np.full(nodes + 1, -1, np.int32)  # the last entry stands for the id -1
    place_N[nodes_A] = np.arange(len(nodes_A), dtype=np.int32)
    order_A = place_N[order_N]
    if before is not None:
        before = before[0][nodes_A], before[1]
    table_AM = place_N[table_NM[nodes_A]]
    part_A, cut = _assigned(table_AM, order_A[order_A >= 0], settings, before)
    part_N = np.full(nodes, -1, np.int32)
    part_N[nodes_A] = part_A
    return followers.follow(part_N, nearest, settings.partition.parts), cut


def _assigned(
    table_NM: np.ndarray,
    order_N: np.ndarray,
    settings: GraphConfig,
    before: tuple[np.ndarray, float] | None,
) -> tuple[np.ndarray, float]:
    """As ``_parts``, of nodes with candidates; ``before``: what it returned for the previous graph."""
    if before is not None:
        part_N, first_cut = before
        if settings.partition.partitioner != "ranges":
            part_N = fennel.refine_partition(
                table_NM, part_N, settings.partition.parts, settings.partition.move_gain
            )
        if partition.edge_cut(table_NM, part_N) <= settings.partition.repartition_cut * max(
            first_cut, 0.01
        ):
            return part_N, first_cut
    if settings.partition.partitioner == "streaming":
        part_N = fennel.assign_streaming(table_NM, order_N, settings.partition.parts)
    elif settings.partition.partitioner == "metis":
        part_N = partition.assign(table_NM, settings.partition.parts)
    else:
        part_N = partition.assign_ranges(table_NM, settings.partition.parts)
    return part_N, partition.edge_cut(table_NM, part_N)


def _cut_parts(context: Context, writer: GraphWriter) -> list[partition.PartSize]:
    """Each rank cuts the parts that it will own out of the table (collective); sizes of all parts in order.

    Raises:
        UserError: on every rank: the disk of one is full, or rank 0 does not see what another has written.
    """
    ranks, parts = context.ranks, context.config.graph.partition.parts
    shared = {"candidates.npy": True, "part.npy": True}  # rank 0 has written them
    handover.hand_over(writer.path, lambda: handover.described(writer.path, shared))

    def cut() -> tuple[dict[int, partition.PartSize], handover.Files]:
        table_NM, part_N = (np.asarray(writer.array(name)) for name in ("candidates", "part"))
        sizes, files = dict[int, partition.PartSize](), dict[str, handover.Written]()
        for number in parts_of_rank(ranks.rank, ranks.world_size, parts):
            part = partition.build_part(table_NM, part_N, number)
            folder = version.part_path(writer.path, number)
            part.save(folder)
            sizes[number] = part.size
            if members.on_several_hosts():
                names = {str(path.relative_to(writer.path)): True for path in folder.iterdir()}
                files |= handover.described(writer.path, names)
        return sizes, files

    told = exchange.every_rank(cut)
    written = {name: one for _, files in told for name, one in files.items()}
    if host_folders.are_separate():
        handover.hand_over(writer.path, lambda: written)
    elif members.on_several_hosts():
        collectives.alone(lambda: handover.wait_for(writer.path, written))
    sizes = {number: size for own, _ in told for number, size in own.items()}
    return [sizes[number] for number in range(parts)]


def _finalise(
    context: Context,
    writer: GraphWriter,
    sizes: list[partition.PartSize],
    cut_when_assigned: float,
    searched: dict[str, Any],
    previous: GraphVersion | None,
    moment: str,
) -> Path:
    names = ("candidates", "labels", "part")
    table_NM, labels_N, part_N = (np.asarray(writer.array(name)) for name in names)
    return writer.finalise(
        {
            "key": context.key,
            "moment": moment,
            "nodes": len(part_N),
            "candidates": table_NM.shape[1],
            "homophily": quality.edge_homophily(table_NM, labels_N),
            "degree": quality.degree_stats(table_NM),
            "search": searched,
            **partition.summary(table_NM, part_N, sizes),
            "moved": 0.0 if previous is None else float((part_N != previous.part).mean()),
            "cut_when_assigned": cut_when_assigned,
            "halo": [size.halo1 + size.halo2 for size in sizes],
        }
    )
