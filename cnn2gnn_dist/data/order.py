"""The order of samples: a pure function of (seed, epoch, manifest, parts, global batch).

Shards are permuted per epoch and grouped in windows; samples are permuted inside a window;
the concatenation is cut into global batches. Random numbers are counter-based (Philox keyed
by seed, epoch and window), so any batch is computed without the ones before it, and the
order never depends on ranks, actors or threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from cnn2gnn_dist.errors import UserError

CACHED_WINDOWS = 4


class Order:
    """Global batches of sample ids.

    Args:
        shard_sizes: [S] samples of each shard; ids count through the shards in turn.
        seed: of the permutations.
        global_batch: G, samples of a step over all ranks.
        window: shards shuffled together.
        parts: disjoint ascending id arrays that cover all samples; each then has its own
            sequence and a fixed share of every global batch, so that all end together.

    Raises:
        UserError: fewer samples than a global batch, or parts than samples of one.
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
        if total < global_batch:
            raise UserError(
                f"{total} samples are fewer than one global batch of {global_batch}",
                where="global_batch",
                remedy=f"a global batch of at most {total}, or more samples",
            )
        self.part_N: np.ndarray | None = None
        counts = [total]
        if parts is not None:
            counts = [len(part) for part in parts]
            self.part_N = _part_of(parts, total)
        self.shares = shares_of(counts, global_batch)
        self.batches_per_epoch = min(
            count // share for count, share in zip(counts, self.shares, strict=True) if share
        )
        self._windows: OrderedDict[tuple[int, int], list[np.ndarray]] = OrderedDict()
        self._layouts: OrderedDict[int, np.ndarray] = OrderedDict()

    def batch(self, epoch: int, index: int) -> np.ndarray:
        """[G] int64 ids of one global batch, part after part."""
        return np.concatenate([self._slice(epoch, index, part) for part in range(len(self.shares))])

    def rank_batch(self, epoch: int, index: int, rank: int, world_size: int) -> np.ndarray:
        """This rank's rows: [r·G/R, (r+1)·G/R), or the shares of its parts (p·R // P == r).

        Raises:
            UserError: R does not divide G; fewer parts than ranks.
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
        ends = self._layout(epoch)[:, part]
        window = int(np.searchsorted(ends, first, side="right"))
        found = []
        while first < last:
            begin = int(ends[window - 1]) if window else 0
            ids = self._window(epoch, window)[part]
            found.append(ids[first - begin : last - begin])
            first = min(last, int(ends[window]))
            window += 1
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _layout(self, epoch: int) -> np.ndarray:
        """[windows, parts] where each part's sequence ends in each window."""
        if epoch not in self._layouts:
            rows = [
                [len(ids) for ids in self._divided(self._members(epoch, window))]
                for window in range(self._window_count())
            ]
            self._layouts[epoch] = np.cumsum(np.asarray(rows, dtype=np.int64), axis=0)
            _trim(self._layouts, 2)
        return self._layouts[epoch]

    def _window(self, epoch: int, window: int) -> list[np.ndarray]:
        """Permuted ids of a window, by part."""
        key = (epoch, window)
        if key not in self._windows:
            ids = self._members(epoch, window)
            rng = np.random.Generator(np.random.Philox(key=_key(self.seed, epoch, window + 1)))
            self._windows[key] = self._divided(rng.permutation(ids))
            _trim(self._windows, CACHED_WINDOWS)
        return self._windows[key]

    def _divided(self, ids: np.ndarray) -> list[np.ndarray]:
        if self.part_N is None:
            return [ids]
        part = self.part_N[ids]
        return [ids[part == number] for number in range(len(self.shares))]

    def _members(self, epoch: int, window: int) -> np.ndarray:
        """Ids of a window's shards, not permuted inside."""
        rng = np.random.Generator(np.random.Philox(key=_key(self.seed, epoch, 0)))
        shards = rng.permutation(len(self.sizes))[window * self.window : (window + 1) * self.window]
        spans = [np.arange(self.starts[s], self.starts[s + 1], dtype=np.int64) for s in shards]
        return np.concatenate(spans)

    def _window_count(self) -> int:
        return -(-len(self.sizes) // self.window)


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
    if global_batch % (world_size * accumulation):
        raise UserError(
            f"a global batch of {global_batch} is not {world_size} ranks x {accumulation} "
            "micro-batches x a whole number",
            where="global_batch",
            remedy=f"a multiple of {world_size * accumulation}",
        )


def _part_of(parts: Sequence[np.ndarray], total: int) -> np.ndarray:
    part_N = np.full(total, -1, dtype=np.int32)
    for number, ids in enumerate(parts):
        part_N[ids] = number
    if (part_N < 0).any() or sum(len(ids) for ids in parts) != total:
        raise ValueError("parts must be disjoint and cover all samples")
    return part_N


def _key(seed: int, epoch: int, stream: int) -> np.ndarray:
    """128-bit Philox key; the seed has a word of its own."""
    return np.array([seed, (epoch << 32) | stream], dtype=np.uint64)


def _trim(cache: OrderedDict, limit: int) -> None:  # type: ignore[type-arg]
    while len(cache) > limit:
        cache.popitem(last=False)
