"""Divisibility checks for ranks, micro-batches, partitions and samples.

Pure and cheap, so that a mismatch is refused at the start, with the numbers involved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnn2gnn_dist.errors import UserError


def shares_of(counts: Sequence[int], total: int) -> list[int]:
    """Split ``total`` in proportion to ``counts`` by largest remainder, at least 1 for each non-empty one.

    Raises:
        UserError: more partitions with samples than ``total``.
        ValueError: no samples at all, or negative counts.
    """
    weights = np.asarray(counts, dtype=np.float64)
    nonempty = weights > 0
    if not nonempty.any() or (weights < 0).any():
        raise ValueError(f"shares of {total} for parts of {list(counts)} samples")
    if nonempty.sum() > total:
        raise UserError(
            f"{int(nonempty.sum())} partitions share a global batch of {total}: less than one "
            "sample each",
            where="graph.partition.parts",
            remedy="use fewer partitions or a larger global batch",
        )
    exact = weights / weights.sum() * total
    shares = np.maximum(np.floor(exact), nonempty).astype(int)
    while shares.sum() != total:
        gap = exact - shares
        if shares.sum() < total:
            shares[int(np.argmax(gap))] += 1
        else:
            gap[shares <= 1] = np.inf
            shares[int(np.argmin(gap))] -= 1
    return shares.tolist()


def micro_batches(ids: np.ndarray, accumulation: int, first: int | None = None) -> list[np.ndarray]:
    """Split a rank's ``ids`` into ``accumulation`` micro-batches as even as possible, none empty.

    Args:
        ids: the rank's rows of a global batch, in order.
        accumulation: number of micro-batches.
        first: None: micro-batches are contiguous slices of ``ids``. Else the position of ``ids[0]`` in
            the global batch: rows are dealt round-robin by position, so that all micro-batches get
            equally many rows (within one) of any contiguous range, such as a partition's, and the
            union over all ranks of the micro-batches with the same number does not depend on the ranks.

    Raises:
        UserError: fewer ids than micro-batches.
    """
    if not 1 <= accumulation <= len(ids):
        raise UserError(
            f"a rank's {len(ids)} samples can't be split into {accumulation} micro-batches",
            where="global_batch, max_micro_batch",
            remedy="use a larger global batch, or larger (so fewer) micro-batches",
        )
    if first is None:
        return np.array_split(ids, accumulation)
    return [ids[(piece - first) % accumulation :: accumulation] for piece in range(accumulation)]


def check_arithmetic(global_batch: int, world_size: int, accumulation: int) -> None:
    """Check that G = R x accumulation x an integer micro-batch.

    Raises:
        UserError: it is not.
    """
    unit = world_size * accumulation
    if world_size < 1 or accumulation < 1:
        raise UserError(
            f"{world_size} ranks x {accumulation} micro-batches: both must be 1 or more",
            where="run.ranks, max_micro_batch",
            remedy="set each to at least 1",
        )
    if global_batch < 1 or global_batch % unit:
        below = global_batch // unit * unit
        nearest = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise UserError(
            f"a global batch of {global_batch} is not {world_size} ranks x {accumulation} "
            f"micro-batches x an integer ({global_batch} / {unit} = {global_batch / unit:.3g})",
            where="global_batch",
            remedy=f"use a multiple of {unit}: {nearest}",
        )


def check_parts(parts: int, world_size: int, global_batch: int | None = None) -> None:
    """Check that every rank has a partition, and every partition a place in the global batch.

    These checks are possible before partitioning; ``Order`` does the rest when it knows the sizes.

    Raises:
        UserError: fewer partitions than ranks; more than G.
    """
    if not 1 <= world_size <= parts:
        raise UserError(
            f"{parts} partitions can't be shared by {world_size} ranks: every rank needs one",
            where="graph.partition.parts",
            remedy=f"set graph.partition.parts={world_size} or a multiple of it",
        )
    if global_batch is not None and parts > global_batch:
        raise UserError(
            f"{parts} partitions share a global batch of {global_batch}: less than one sample each",
            where="graph.partition.parts, global_batch",
            remedy=f"set graph.partition.parts={global_batch} or fewer, or use a larger global "
            "batch",
        )


def parts_of_rank(rank: int, world_size: int, parts: int) -> range:
    """The partitions of a rank: all p with p·R // P == r.

    A contiguous range, so that the ranks in order give the global batch.
    """
    return range(-(-rank * parts // world_size), -(-(rank + 1) * parts // world_size))


def check_sizes(total: int, shards: int, global_batch: int, window: int) -> None:
    """Check that the samples of all shards fill a global batch.

    Raises:
        UserError: they don't, or the global batch or window is not positive.
    """
    if global_batch < 1 or window < 1:
        raise UserError(
            f"a global batch of {global_batch} and a window of {window} shards: "
            "both must be 1 or more",
            where="global_batch, stream.window",
            remedy="set each to at least 1",
        )
    if total < global_batch:
        raise UserError(
            f"{total} samples are fewer than one global batch of {global_batch}: "
            f"{total} // {global_batch} = 0 batches per epoch ({shards} shards)",
            where="global_batch",
            remedy=f"use a global batch of at most {total}, or more samples"
            if total
            else "use data that contains samples",
        )
