"""The order of samples: a pure function of (seed, epoch, manifest, parts, global batch).

Shards are permuted per epoch and grouped in windows; samples are permuted inside a window;
the concatenation is cut into global batches. Random numbers are counter-based (Philox keyed
by seed, epoch and window), so any batch is computed without the ones before it, and the
order never depends on ranks, actors or threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from cnn2gnn_dist.errors import UserError

Key = TypeVar("Key")
Value = TypeVar("Value")

CACHED_WINDOWS = 4
CACHED_EPOCHS = 2


class Order:
    """Global batches of sample ids.

    Args:
        shard_sizes: [S] samples of each shard (zeros allowed); ids count through the shards.
        seed: of the permutations.
        global_batch: G, samples of a step over all ranks.
        window: shards shuffled together.
        parts: disjoint ascending id arrays that cover all samples; each then has its own
            sequence (the windows' order restricted to its ids) and a fixed share of every
            global batch, so that all end together.

    Attributes:
        batches_per_epoch: whole global batches; what is left over is not shown this epoch.
        shares: samples of each part in a global batch ([G] without parts).

    Raises:
        UserError: fewer samples than a global batch, or more parts than samples of one.
        ValueError: parts that overlap or leave samples out.
    """

    def __init__(
        self,
        shard_sizes: np.ndarray,
        *,
        seed: int,
        global_batch: int,
        window: int,
        parts: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.global_batch, self.window = seed, global_batch, window
        total = int(self.starts[-1])
        _check_sizes(total, len(self.sizes), global_batch, window)
        self.part_N = None if parts is None else _part_of(parts, total)
        self._counts_SP = _counts(self.sizes, self.part_N, 1 if parts is None else len(parts))
        counts = self._counts_SP.sum(0).tolist()
        self.shares = shares_of(counts, global_batch)
        self.batches_per_epoch: int = min(
            count // share for count, share in zip(counts, self.shares, strict=True) if share
        )
        self._windows: OrderedDict[tuple[int, int], list[np.ndarray]] = OrderedDict()
        self._layouts: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def batch(self, epoch: int, index: int) -> np.ndarray:
        """[G] int64 ids of one global batch, part after part."""
        return np.concatenate([self._slice(epoch, index, part) for part in range(len(self.shares))])

    def rank_batch(self, epoch: int, index: int, rank: int, world_size: int) -> np.ndarray:
        """This rank's rows: [r·G/R, (r+1)·G/R), or the shares of its parts (p·R // P == r).

        Raises:
            UserError: R does not divide G (without parts); fewer parts than ranks.
        """
        if self.part_N is None:
            check_arithmetic(self.global_batch, world_size, 1)
            share = self.global_batch // world_size
            return self.batch(epoch, index)[rank * share : (rank + 1) * share]
        parts = len(self.shares)
        if parts < world_size:
            raise UserError(
                f"{parts} parts can't be shared by {world_size} ranks",
                where="graph.parts",
                remedy=f"graph.parts={world_size} or more",
            )
        mine = [p for p in range(parts) if p * world_size // parts == rank]
        return np.concatenate([self._slice(epoch, index, part) for part in mine])

    def _slice(self, epoch: int, index: int, part: int) -> np.ndarray:
        """Ids index·share … of a part's sequence."""
        if not 0 <= index < self.batches_per_epoch:
            raise IndexError(f"batch {index} of {self.batches_per_epoch}")
        share = self.shares[part]
        first, last = index * share, (index + 1) * share
        ends = self._layout(epoch)[1][:, part]
        window = int(np.searchsorted(ends, first, side="right"))
        found = []
        while first < last:
            begin = int(ends[window - 1]) if window else 0
            ids = self._window(epoch, window)[part]
            found.append(ids[first - begin : last - begin])
            first = min(last, int(ends[window]))
            window += 1
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of the shards [S]; each part's end in each window [W, P]."""
        if epoch not in self._layouts:
            rng = np.random.Generator(np.random.Philox(key=_key(self.seed, epoch, 0)))
            shards = rng.permutation(len(self.sizes))
            firsts = np.arange(0, len(shards), self.window)
            counts_WP = np.add.reduceat(self._counts_SP[shards], firsts, axis=0)
            self._layouts[epoch] = shards, np.cumsum(counts_WP, axis=0)
        return _kept(self._layouts, epoch, CACHED_EPOCHS)

    def _window(self, epoch: int, window: int) -> list[np.ndarray]:
        """Permuted ids of a window, by part."""
        key = (epoch, window)
        if key not in self._windows:
            shards = self._layout(epoch)[0][window * self.window : (window + 1) * self.window]
            spans = [np.arange(self.starts[s], self.starts[s + 1], dtype=np.int64) for s in shards]
            rng = np.random.Generator(np.random.Philox(key=_key(self.seed, epoch, window + 1)))
            self._windows[key] = self._divided(rng.permutation(np.concatenate(spans)))
        # Parts may be at different windows (shards sorted by class): room for one each.
        return _kept(self._windows, key, CACHED_WINDOWS + len(self.shares))

    def _divided(self, ids: np.ndarray) -> list[np.ndarray]:
        if self.part_N is None:
            return [ids]
        part = self.part_N[ids]
        ends = np.cumsum(np.bincount(part, minlength=len(self.shares)))
        return np.split(ids[np.argsort(part, kind="stable")], ends[:-1])


def shares_of(counts: Sequence[int], total: int) -> list[int]:
    """``total`` split in proportion to ``counts`` by largest remainder, at least 1 for each.

    Raises:
        UserError: more parts with samples than ``total``.
    """
    weights = np.asarray(counts, dtype=np.float64)
    alive = weights > 0
    if alive.sum() > total:
        raise UserError(
            f"{int(alive.sum())} partitions share a global batch of {total}: too few for one each",
            where="graph.parts",
            remedy="fewer partitions, or a larger global batch",
        )
    exact = weights / weights.sum() * total
    shares = np.maximum(np.floor(exact), alive).astype(int)
    while shares.sum() != total:
        gap = exact - shares
        if shares.sum() < total:
            shares[int(np.argmax(gap))] += 1
        else:
            gap[shares <= 1] = np.inf
            shares[int(np.argmin(gap))] -= 1
    return shares.tolist()


def micro_batches(ids: np.ndarray, accumulation: int) -> list[np.ndarray]:
    """``ids`` in order, cut into ``accumulation`` pieces as even as possible."""
    return np.array_split(ids, accumulation)


def sequential(
    num_samples: int, batch: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's share of 0..N-1 in order, without shuffling: (ids [batch], mask [batch]).

    Step b covers ids from b·batch·R on, each rank a stretch. All ranks get as many steps;
    padding repeats the last id under a False mask.
    """
    for start in range(0, num_samples, batch * world_size):
        ids = np.arange(batch, dtype=np.int64) + start + rank * batch
        yield np.minimum(ids, num_samples - 1), ids < num_samples


def check_arithmetic(global_batch: int, world_size: int, accumulation: int) -> None:
    """See that G = R x accumulation x a whole micro-batch.

    Raises:
        UserError: it is not.
    """
    unit = world_size * accumulation
    if global_batch < 1 or global_batch % unit:
        below = global_batch // unit * unit
        nearest = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise UserError(
            f"a global batch of {global_batch} is not {world_size} ranks x {accumulation} "
            f"micro-batches x a whole number ({global_batch} / {unit} = {global_batch / unit:.3g})",
            where="global_batch",
            remedy=f"a multiple of {unit}: {nearest}",
        )


def _check_sizes(total: int, shards: int, global_batch: int, window: int) -> None:
    if global_batch < 1 or window < 1:
        raise UserError(
            f"a global batch of {global_batch} and a window of {window} shards: "
            "both must be 1 or more",
            where="global_batch, stream.window",
            remedy="at least 1 for each",
        )
    if total < global_batch:
        raise UserError(
            f"{total} samples are fewer than one global batch of {global_batch}: "
            f"{total} // {global_batch} = 0 batches an epoch ({shards} shards)",
            where="global_batch",
            remedy=f"a global batch of at most {total}, or more samples"
            if total
            else "data with samples in it",
        )


def _part_of(parts: Sequence[np.ndarray], total: int) -> np.ndarray:
    part_N = np.full(total, -1, dtype=np.int32)
    for number, ids in enumerate(parts):
        part_N[ids] = number
    if (part_N < 0).any() or sum(len(ids) for ids in parts) != total:
        raise ValueError("parts must be disjoint and cover all samples")
    return part_N


def _counts(sizes_S: np.ndarray, part_N: np.ndarray | None, parts: int) -> np.ndarray:
    """[S, P] samples of each shard in each part."""
    if part_N is None:
        return sizes_S[:, None]
    cell_N = np.repeat(np.arange(len(sizes_S)), sizes_S) * parts + part_N
    return np.bincount(cell_N, minlength=len(sizes_S) * parts).reshape(-1, parts)


def _key(seed: int, epoch: int, stream: int) -> np.ndarray:
    """128-bit Philox key; the seed has a word of its own."""
    return np.array([seed & 0xFFFFFFFFFFFFFFFF, (epoch << 32) | stream], dtype=np.uint64)


def _kept(cache: OrderedDict[Key, Value], key: Key, limit: int) -> Value:
    """The cached value, now the most recent; the least recent beyond ``limit`` are dropped."""
    cache.move_to_end(key)
    while len(cache) > limit:
        cache.popitem(last=False)
    return cache[key]
