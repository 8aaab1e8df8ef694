"""The order of samples: a pure function of (seed, epoch, manifest, partitions, global batch).

Shards are permuted per epoch and grouped into windows; samples are permuted within a window; the
concatenation is split into global batches. Random numbers are counter-based (Philox keyed by seed,
epoch and window), so any batch is computed without the ones before it, and the order never depends
on ranks, actors or threads.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from cnn2gnn_dist.data.batch_sizes import (
    check_arithmetic,
    check_parts,
    check_sizes,
    micro_batches,
    parts_of_rank,
    shares_of,
)
from cnn2gnn_dist.errors import UserError

__all__ = [
    "Order",
    "check_arithmetic",
    "micro_batches",
    "sequential",
    "sequential_batch",
    "shares_of",
]

Key = TypeVar("Key")
Value = TypeVar("Value")

CACHED_WINDOWS = 4
CACHED_EPOCHS = 2
UNSHOWN = 0.1
"""Share of the samples that an epoch may leave out without a note (``Order.short_epoch``)."""
TOLERATED = 1.1
"""How much larger than allowed a micro-batch may be without a note, and by one: partitioners balance within 3 %."""
MOST_EPOCHS = 2**32
"""Number of epochs that the random key can distinguish."""


class Order:
    """Global batches of sample ids.

    Args:
        shard_sizes: [S] samples per shard (zeros allowed); ids are numbered across the shards.
        seed: seed of the permutations, any integer, taken modulo 2^64.
        global_batch: G, samples per step over all ranks.
        window: number of shards shuffled together.
        parts: partitions, as disjoint ascending id arrays that cover all samples; each partition then
            has its own sequence (the windows' order restricted to its ids) and a fixed share of every
            global batch, so that all end together.
        only: [N] bool: the samples that occur, in the order of all; None: all. Not with ``parts``.

    Attributes:
        digest: hex digest of everything that the sequence depends on.
        batches_per_epoch: number of full global batches; the remaining samples are skipped this epoch.
        shares: samples per partition in a global batch ([G] without partitions).

    Raises:
        UserError: fewer samples than a global batch, or more partitions than samples in one.
        ValueError: negative sizes; partitions that overlap, omit samples or contain unknown ids.
    """

    def __init__(
        self,
        shard_sizes: np.ndarray,
        *,
        seed: int,
        global_batch: int,
        window: int,
        parts: Sequence[np.ndarray] | None = None,
        only: np.ndarray | None = None,
    ) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        if (self.sizes < 0).any():
            raise ValueError("a shard has a negative number of samples")
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        # Python integers: a numpy int32 would overflow silently further down.
        self.seed, self.global_batch, self.window = int(seed), int(global_batch), int(window)
        total = int(self.starts[-1])
        if only is not None and (parts is not None or only.shape != (total,)):
            raise ValueError(f"only: one value for each of {total} samples, and no partitions")
        self.only_N = None if only is None else np.asarray(only, bool)
        occur = total if only is None else int(np.count_nonzero(only))
        check_sizes(occur, len(self.sizes), global_batch, window)
        self.part_N = None if parts is None else _part_of(parts, total)
        self._counts_SP = _counts(self.sizes, self.part_N, 1 if parts is None else len(parts))
        if self.only_N is not None:
            sums_N = np.concatenate([[0], np.cumsum(self.only_N)])
            self._counts_SP = np.diff(sums_N[self.starts])[:, None]
        counts = self._counts_SP.sum(0).tolist()
        self.shares = shares_of(counts, global_batch)
        self.batches_per_epoch: int = min(
            count // share for count, share in zip(counts, self.shares, strict=True) if share
        )
        self.digest = self._digest()
        self._windows: OrderedDict[tuple[int, int], list[np.ndarray]] = OrderedDict()
        self._layouts: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._checked: set[int] = set()

    def _digest(self) -> str:
        """Hash everything that the sequence depends on."""
        numbers = [self.seed & 0xFFFFFFFFFFFFFFFF, self.global_batch, self.window]
        found = hashlib.sha256(np.array(numbers, np.uint64).tobytes() + self.sizes.tobytes())
        if self.part_N is not None:
            found.update(np.asarray(self.part_N, np.int64).tobytes())
        if self.only_N is not None:
            found.update(np.packbits(self.only_N).tobytes())
        return found.hexdigest()[:20]

    def batch(self, epoch: int, index: int) -> np.ndarray:
        """Return the ids [G] int64 of one global batch, ordered by partition.

        Raises:
            IndexError: no such batch or epoch.
        """
        return np.concatenate([self._slice(epoch, index, part) for part in range(len(self.shares))])

    def rank_batch(self, epoch: int, index: int, rank: int, world_size: int) -> np.ndarray:
        """Return this rank's rows: [r·G/R, (r+1)·G/R), or the shares of its partitions (p·R // P == r).

        Raises:
            UserError: as ``check_ranks`` without accumulation.
            IndexError: no such batch, epoch or rank.
        """
        if world_size not in self._checked:
            self.check_ranks(world_size)
            self._checked.add(world_size)
        if not 0 <= rank < world_size:
            raise IndexError(f"rank {rank} of {world_size}")
        if self.part_N is None:
            share = self.global_batch // world_size
            return self.batch(epoch, index)[rank * share : (rank + 1) * share]
        return np.concatenate(
            [self._slice(epoch, index, part) for part in self._own_parts(rank, world_size)]
        )

    def micro_batches(
        self, epoch: int, index: int, rank: int, world_size: int, accumulation: int
    ) -> list[np.ndarray]:
        """Return this rank's rows, split into the micro-batches of a step.

        Without partitions, micro-batches are contiguous, so that 2 ranks get what one rank gets in 2
        micro-batches. With partitions, whose rows are contiguous, rows are dealt round-robin: all
        micro-batches get equally many rows (within one) of every partition, because BatchNorm treats a
        micro-batch as a sample of the data. The union of micro-batch j over all ranks is the same for
        any number of ranks.

        Raises:
            UserError: as ``check_ranks``.
            IndexError: no such batch, epoch or rank.
        """
        ids = self.rank_batch(epoch, index, rank, world_size)
        first = None
        if self.part_N is not None:
            first = sum(self.shares[: self._own_parts(rank, world_size).start])
        return micro_batches(ids, accumulation, first)

    def check_ranks(self, world_size: int, accumulation: int = 1) -> None:
        """Check that each of R ranks has rows for each of its micro-batches, in every batch.

        Without partitions, all ranks and micro-batches have equal size; with partitions, a rank has the
        sum of its partitions' shares, the same in every batch.

        Raises:
            UserError: G is not R x accumulation x an integer (without partitions); fewer partitions
                than ranks, or a rank with fewer rows than micro-batches.
        """
        if self.part_N is None:
            check_arithmetic(self.global_batch, world_size, accumulation)
            return
        check_parts(len(self.shares), world_size)
        for rank in range(world_size):
            own = self._own_parts(rank, world_size)
            shares = [self.shares[part] for part in own]
            if sum(shares) < accumulation:
                raise UserError(
                    f"rank {rank} of {world_size} gets {sum(shares)} of the {self.global_batch} "
                    f"rows of a global batch (partitions {own.start} to {own.stop - 1} have shares "
                    f"{' + '.join(map(str, shares))}), too few for {accumulation} micro-batches",
                    where="global_batch, max_micro_batch, graph.partition.parts",
                    remedy="use a larger global batch, larger (so fewer) micro-batches, or fewer "
                    "ranks and partitions",
                )

    def short_epoch(self) -> str | None:
        """One sentence if an epoch leaves out many samples because the partitions' shares are uneven, else None.

        The partition that ends first ends the epoch: one of 3 samples with a share of 1 after 3 batches.
        """
        shown = self.batches_per_epoch * self.global_batch
        total = int(self.starts[-1])
        if self.part_N is None or total - shown < max(UNSHOWN * total, self.global_batch):
            return None
        counts = self._counts_SP.sum(0)
        first = min(
            (int(n) // s, p) for p, (n, s) in enumerate(zip(counts, self.shares, strict=True)) if s
        )[1]
        return (
            f"an epoch shows {shown / total:.0%} of the images (others each time): partition {first} of "
            f"{counts[first]:,} images has {self.shares[first]} of {self.global_batch} places in a batch and is "
            "through first; a global batch that is a multiple of equal partitions shows them all"
        )

    def uneven_ranks(self, world_size: int, accumulation: int, max_micro_batch: int) -> str | None:
        """One sentence if a rank's partitions give it clearly larger micro-batches than it may hold, else None."""
        if self.part_N is None:
            return None
        shares = [
            sum(self.shares[part] for part in self._own_parts(rank, world_size))
            for rank in range(world_size)
        ]
        most = -(-max(shares) // accumulation)
        if most <= TOLERATED * max_micro_batch + 1:
            return None
        return (
            f"rank {shares.index(max(shares))} holds {most} images at once, more than {max_micro_batch}: its "
            f"partitions have {max(shares)} of {self.global_batch} places in a batch"
            + f"; with a multiple of {world_size} partitions ranks have about as many"
            * (len(self.shares) % world_size > 0)
        )

    def _own_parts(self, rank: int, world_size: int) -> range:
        return parts_of_rank(rank, world_size, len(self.shares))

    def _slice(self, epoch: int, index: int, part: int) -> np.ndarray:
        """Return ids [index·share, (index+1)·share) of a partition's sequence."""
        epoch, index = int(epoch), int(index)
        if not 0 <= index < self.batches_per_epoch:
            raise IndexError(f"batch {index} of {self.batches_per_epoch}")
        if not 0 <= epoch < MOST_EPOCHS:
            raise IndexError(f"epoch {epoch} is not in 0..{MOST_EPOCHS - 1}")
        share = self.shares[part]
        first, last = index * share, (index + 1) * share
        ends = self._layout(epoch)[1][:, part]
        found = []
        while first < last:
            # The first window that ends after ``first``: windows without samples of this partition
            # (empty shards, shards of other classes) are never permuted.
            window = int(np.searchsorted(ends, first, side="right"))
            begin = int(ends[window - 1]) if window else 0
            ids = self._window(epoch, window)[part]
            found.append(ids[first - begin : last - begin])
            first = min(last, int(ends[window]))
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's permutation of the shards [S], and each partition's end in each window [W, P]."""
        if epoch not in self._layouts:
            rng = np.random.Generator(np.random.Philox(key=_key(self.seed, epoch, 0)))
            shards = rng.permutation(len(self.sizes))
            firsts = np.arange(0, len(shards), self.window)
            counts_WP = np.add.reduceat(self._counts_SP[shards], firsts, axis=0)
            self._layouts[epoch] = shards, np.cumsum(counts_WP, axis=0)
        return _kept(self._layouts, epoch, CACHED_EPOCHS)

    def _window(self, epoch: int, window: int) -> list[np.ndarray]:
        """Return the permuted ids of a window, by partition."""
        key = (epoch, window)
        if key not in self._windows:
            shards = self._layout(epoch)[0][window * self.window : (window + 1) * self.window]
            rng = np.random.Generator(np.random.Philox(key=_key(self.seed, epoch, window + 1)))
            spans = [np.arange(self.starts[s], self.starts[s + 1], dtype=np.int64) for s in shards]
            self._windows[key] = self._divided(rng.permutation(np.concatenate(spans)))
        # Partitions may be at different windows (shards sorted by class): cache one for each.
        return _kept(self._windows, key, CACHED_WINDOWS + len(self.shares))

    def _divided(self, ids: np.ndarray) -> list[np.ndarray]:
        if self.only_N is not None:
            return [ids[self.only_N[ids]]]
        if self.part_N is None:
            return [ids]
        part = self.part_N[ids]
        ends = np.cumsum(np.bincount(part, minlength=len(self.shares)))
        return np.split(ids[np.argsort(part, kind="stable")], ends[:-1])


def sequential(
    num_samples: int, batch: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield this rank's share of 0..N-1 in order, without shuffling: (ids [batch], mask [batch]).

    Step b covers ids from b·batch·R on, each rank a contiguous slice. All ranks get the same number of
    steps; padding repeats the last id with a False mask. Without samples, nothing is yielded.

    Raises:
        UserError: the batch is smaller than 1.
        IndexError: no such rank.
    """
    if batch < 1:
        raise UserError(
            f"batches of {batch} samples", where="max_micro_batch", remedy="set it to at least 1"
        )
    if not 0 <= rank < world_size:
        raise IndexError(f"rank {rank} of {world_size}")
    return _sequential(num_samples, batch, rank, world_size)


def _sequential(
    num_samples: int, batch: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for index in range(-(-num_samples // (batch * world_size))):
        yield sequential_batch(num_samples, batch, index, rank, world_size)


def sequential_batch(
    num_samples: int, batch: int, index: int, rank: int, world_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return step ``index`` of ``sequential``: (ids [batch], mask [batch])."""
    ids = np.arange(batch, dtype=np.int64) + (index * world_size + rank) * batch
    return np.minimum(ids, num_samples - 1), ids < num_samples


def _part_of(parts: Sequence[np.ndarray], total: int) -> np.ndarray:
    """Return the partition of each sample [N] in the narrowest type: up to 16 bits sort several times faster."""
    if any(len(ids) and not 0 <= ids.min() <= ids.max() < total for ids in parts):
        raise ValueError(f"partitions contain samples outside 0..{total - 1}")
    part_N = np.full(total, -1, dtype=np.min_scalar_type(-len(parts) - 1))
    for number, ids in enumerate(parts):
        part_N[ids] = number
    if (part_N < 0).any() or sum(len(ids) for ids in parts) != total:
        raise ValueError("partitions must be disjoint and cover all samples")
    return part_N


def _counts(sizes_S: np.ndarray, part_N: np.ndarray | None, parts: int) -> np.ndarray:
    """Return the number of samples of each shard in each partition, [S, P]."""
    if part_N is None:
        return sizes_S[:, None]
    cell_N = np.repeat(np.arange(len(sizes_S)), sizes_S) * parts + part_N
    return np.bincount(cell_N, minlength=len(sizes_S) * parts).reshape(-1, parts)


def _key(seed: int, epoch: int, stream: int) -> np.ndarray:
    """Return a 128-bit Philox key, one word of which is the seed. ``epoch`` and ``stream`` are below 2^32."""
    return np.array([seed & 0xFFFFFFFFFFFFFFFF, (epoch << 32) | stream], dtype=np.uint64)


def _kept(cache: OrderedDict[Key, Value], key: Key, limit: int) -> Value:
    """Return a cached value, marking it as most recently used; evict beyond ``limit``."""
    cache.move_to_end(key)
    while len(cache) > limit:
        cache.popitem(last=False)
    return cache[key]
