"""A plain, slow reference implementation of the order, written from the design, that the fast code must match."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st


def shuffled(values: object, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation keyed only by (seed, epoch, stream); stream 0 permutes the shards."""
    key = np.array([seed % 2**64, epoch * 2**32 + stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(values)


def plain_windows(sizes: Sequence[int], seed: int, epoch: int, window: int) -> list[list[int]]:
    """The ids of each window of an epoch, in order."""
    starts = np.cumsum([0, *sizes])
    shards = list(shuffled(len(sizes), seed, epoch, 0))
    found = []
    for number, first in enumerate(range(0, len(shards), window), 1):
        members = [i for s in shards[first : first + window] for i in range(*starts[s : s + 2])]
        found.append(shuffled(np.array(members, dtype=np.int64), seed, epoch, number).tolist())
    return found


def plain_order(sizes: Sequence[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """All ids of an epoch."""
    windows = plain_windows(sizes, seed, epoch, window)
    return np.array([i for ids in windows for i in ids], dtype=np.int64)


def plain_batches(
    sizes: Sequence[int],
    seed: int,
    epoch: int,
    window: int,
    shares: Sequence[int],
    parts: Sequence[np.ndarray] | None,
) -> list[list[int]]:
    """All full global batches of an epoch: the next ``share`` ids of each partition, in partition order."""
    sequence = plain_order(sizes, seed, epoch, window).tolist()
    owned = [set(part.tolist()) for part in parts] if parts is not None else [set(sequence)]
    left = [[i for i in sequence if i in own] for own in owned]
    found = []
    while all(len(ids) >= share for ids, share in zip(left, shares, strict=True)):
        found.append([i for ids, share in zip(left, shares, strict=True) for i in ids[:share]])
        left = [ids[share:] for ids, share in zip(left, shares, strict=True)]
    return found


def parts_of(total: int, count: int, seed: int) -> list[np.ndarray] | None:
    """Random disjoint partitions that cover all ids; None for no partitions."""
    if not count:
        return None
    part = np.random.default_rng(seed).integers(0, count, total)
    return [np.flatnonzero(part == p) for p in range(count)]


SIZES = st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)
