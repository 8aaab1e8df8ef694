"""The sequence of global batches is independent of ranks, readers, backends and accumulation."""

from __future__ import annotations

import hashlib
import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn2gnn_dist.data import order as orders
from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.order import CACHED_EPOCHS, CACHED_WINDOWS, Order
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from tests.support.examples import examples
from tests.support.reference_order import plain_batches, plain_order, plain_windows
from tests.support.shards import make_shards, random_images

WORLDS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """The inputs from which an order is computed."""

    sizes: tuple[int, ...]
    seed: int
    global_batch: int
    window: int
    parts: tuple[np.ndarray, ...] | None

    def order(self) -> Order:
        """A fresh order, as after a restart."""
        return Order(
            np.array(self.sizes),
            seed=self.seed,
            global_batch=self.global_batch,
            window=self.window,
            parts=self.parts,
        )

    def plain(self, epoch: int) -> list[list[int]]:
        """The epoch's global batches by the reference implementation."""
        shares = self.order().shares
        return plain_batches(self.sizes, self.seed, epoch, self.window, shares, self.parts)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shards of any size, including 0 and 1, with enough samples in all for a batch that 8 ranks can share."""
    batch = 8 * draw(st.integers(1, 4), label="rows of each of 8 ranks")
    size = st.one_of(st.just(0), st.just(1), st.integers(2, 40))
    sizes = draw(st.lists(size, max_size=12))
    sizes = draw(st.permutations([*sizes, max(1, batch - sum(sizes))]))
    count = draw(st.sampled_from([0, 0, 8, 11, batch]), label="parts")
    parts = None
    if 0 < count <= batch:
        total, rng = sum(sizes), np.random.default_rng(draw(st.integers(0, 999)))
        part = rng.integers(0, count, total)
        part[rng.permutation(total)[:count]] = np.arange(count)  # no partition is empty
        if draw(st.booleans(), label="parts follow the shards"):
            part.sort()
        parts = tuple(np.flatnonzero(part == p) for p in range(count))
    window = draw(st.integers(1, len(sizes) + 2))
    return Case(tuple(sizes), draw(st.integers(-(2**64), 2**64)), batch, window, parts)


def ways_of(order: Order) -> list[tuple[int, int]]:
    """All (ranks, accumulation) that the order accepts."""
    found = []
    for world, accumulation in itertools.product(WORLDS, range(1, order.global_batch + 1)):
        try:
            order.check_ranks(world, accumulation)
        except orders.UserError:
            continue
        found.append((world, accumulation))
    return found


def places_of(order: Order, world: int, accumulation: int) -> list[int]:
    """Positions of the rows in the global batch, in the order of the ranks' micro-batches.

    Without partitions 0, 1, …; with partitions a rank's rows are dealt round-robin to its micro-batches.
    """
    if order.part_N is None:
        return list(range(order.global_batch))
    owners = [part * world // len(order.shares) for part in range(len(order.shares))]
    owner_G = [
        owner for owner, share in zip(owners, order.shares, strict=True) for _ in range(share)
    ]
    rows = enumerate(owner_G)
    return [g for _, _, g in sorted((owner, g % accumulation, g) for g, owner in rows)]


def step_of(order: Order, epoch: int, number: int, world: int, accumulation: int) -> list[int]:
    """One global batch assembled from all ranks' micro-batches, each row in its place."""
    rows: list[int] = []
    for rank in range(world):
        for piece in order.micro_batches(epoch, number, rank, world, accumulation):
            assert len(piece)
            rows += piece.tolist()
    places = places_of(order, world, accumulation)
    assert len(rows) == len(places)
    return [row for _, row in sorted(zip(places, rows, strict=True))]


@settings(max_examples=examples(120), deadline=None)
@given(case=cases())
def test_the_sequence_is_the_same_for_any_ranks_and_accumulation(case):
    order = case.order()
    ways = ways_of(order)
    assert {world for world, _ in ways} == set(WORLDS)
    if case.parts is None:  # split every rank's rows in every possible way
        rows = case.global_batch
        assert ways == [(w, a) for w in WORLDS for a in range(1, rows + 1) if rows % (w * a) == 0]
    for epoch in (0, 3):
        wanted = case.plain(epoch)
        assert order.batches_per_epoch == len(wanted)
        for world, accumulation in ways:
            got = [step_of(order, epoch, i, world, accumulation) for i in range(len(wanted))]
            assert got == wanted


@settings(max_examples=examples(120), deadline=None)
@given(case=cases(), data=st.data())
def test_a_run_that_changes_its_ranks_goes_on_with_the_same_sequence(case, data):
    """Restarted with another number of ranks or another accumulation at any point, also at an epoch's end."""
    per_epoch, ways = case.order().batches_per_epoch, ways_of(case.order())
    cuts = data.draw(
        st.lists(st.tuples(st.integers(0, per_epoch + 1), st.sampled_from(ways)), max_size=6)
    )
    cursor, seen = (0, 0), []
    for steps, (world, accumulation) in [*cuts, (3 * per_epoch, ways[-1])]:
        order = case.order()
        for _ in range(steps):
            seen.append(step_of(order, *cursor, world, accumulation))
            epoch, number = cursor
            cursor = (epoch, number + 1) if number + 1 < per_epoch else (epoch + 1, 0)
    wanted = [batch for epoch in range(len(seen) // per_epoch + 1) for batch in case.plain(epoch)]
    assert len(seen) >= 3 * per_epoch
    assert seen == wanted[: len(seen)]


@settings(max_examples=examples(60), deadline=None)
@given(case=cases())
def test_every_rank_gets_as_many_batches_of_as_many_rows(case):
    order = case.order()
    for world in WORLDS:
        rows = [
            {len(order.rank_batch(1, i, rank, world)) for i in range(order.batches_per_epoch)}
            for rank in range(world)
        ]
        assert all(len(sizes) == 1 for sizes in rows)  # the same in every batch
        assert sum(size for sizes in rows for size in sizes) == case.global_batch
        assert min(size for sizes in rows for size in sizes) >= 1
        for rank in range(world):
            with pytest.raises(IndexError, match=f"batch {order.batches_per_epoch} of"):
                order.rank_batch(1, order.batches_per_epoch, rank, world)


def permuted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which the number of every window that is permuted is added; the shards' permutation is not."""
    found: list[int] = []
    plain = orders._key

    def key(seed: int, epoch: int, stream: int) -> np.ndarray:
        found.extend([stream - 1] if stream else [])
        return plain(seed, epoch, stream)

    monkeypatch.setattr(orders, "_key", key)
    return found


@settings(max_examples=examples(60), deadline=None)
@given(case=cases())
def test_any_batch_costs_the_windows_it_touches_and_no_others(case):
    """For any batch b: no earlier batch is computed, and only windows that have a sample of b are permuted."""
    windows = plain_windows(case.sizes, case.seed, 5, case.window)
    window_of = {i: number for number, ids in enumerate(windows) for i in ids}
    for number, wanted in enumerate(case.plain(5)):
        with pytest.MonkeyPatch.context() as patch:
            found = permuted(patch)
            assert case.order().batch(5, number).tolist() == wanted
            assert len(found) == len(set(found))
            assert set(found) == {window_of[i] for i in wanted}
        with pytest.MonkeyPatch.context() as patch:
            found = permuted(patch)
            mine = case.order().rank_batch(5, number, 3, 4).tolist()
            touched = wanted if case.parts is None else mine  # only this rank's partitions
            assert set(found) == {window_of[i] for i in touched}


def test_a_rare_part_skips_the_windows_between(monkeypatch):
    """One class in two distant shards: the windows between have none of it."""
    sizes = np.full(200, 10)
    rare = np.r_[30:35, 1600:1605]
    parts = [rare, np.setdiff1d(np.arange(2000), rare)]
    order = Order(sizes, seed=0, global_batch=200, window=1, parts=parts)
    assert order.shares == [1, 199]
    found = permuted(monkeypatch)
    for number in range(order.batches_per_epoch):
        order._slice(0, number, 0)
    assert len(found) == 2


@pytest.mark.parametrize("count", [0, 6])
def test_memory_is_bounded(count):
    rng = np.random.default_rng(0)
    part = rng.integers(0, max(count, 1), 4000)
    parts = [np.flatnonzero(part == p) for p in range(count)] or None
    order = Order(np.full(80, 50), seed=0, global_batch=40, window=2, parts=parts)
    for epoch, number in rng.integers(0, [30, order.batches_per_epoch], (500, 2)).tolist():
        order.batch(epoch, number)
        held = sum(ids.nbytes for window in order._windows.values() for ids in window)
        assert held <= (CACHED_WINDOWS + max(count, 1)) * 2 * 50 * 8
        assert len(order._layouts) <= CACHED_EPOCHS


def digest(case: Case, epochs: tuple[int, ...]) -> str:
    order, found = case.order(), hashlib.sha256()
    for epoch, number in itertools.product(epochs, range(order.batches_per_epoch)):
        found.update(order.batch(epoch, number).astype("<i8").tobytes())
    return found.hexdigest()[:16]


def test_the_sequence_is_what_it_was():
    """Runs resume by the sequence: neither our code nor a new numpy may change it unnoticed."""
    sizes = (7, 0, 13, 1, 20, 9, 0, 0, 31, 4, 16, 11)
    parts = tuple(np.flatnonzero(np.arange(112) * 5 // 112 == p) for p in range(5))
    assert digest(Case(sizes, -3, 16, 3, None), (0, 1, 2**31)) == "031c04cd611c6d2a"
    assert digest(Case(sizes, -3, 16, 3, parts), (0, 1, 2**31)) == "c76610f182fa4fdf"


def test_seeds_of_any_size():
    sizes = np.full(6, 9)
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**63, -(2**63) + 5, 2**64 - 2]
    found = [Order(sizes, seed=s, global_batch=54, window=3).batch(0, 0).tolist() for s in seeds]
    assert len({tuple(ids) for ids in found}) == len(seeds)
    for seed, ids in zip(seeds, found, strict=True):
        assert ids == plain_order([9] * 6, seed, 0, 3).tolist()
    # Seeds count modulo 2^64, as numpy integers too.
    again = Order(sizes, seed=2**64 + 1, global_batch=54, window=3).batch(0, 0)
    assert again.tolist() == found[1]
    again = Order(sizes, seed=np.int64(-1), global_batch=54, window=3).batch(0, 0)
    assert again.tolist() == found[2]


def test_epochs_of_any_size():
    order = Order(np.full(6, 9), seed=0, global_batch=54, window=3)
    epochs = [0, 1, 2**31, 2**32 - 1]
    found = [order.batch(epoch, 0).tolist() for epoch in epochs]
    assert found == [plain_order([9] * 6, 0, epoch, 3).tolist() for epoch in epochs]
    assert len({tuple(ids) for ids in found}) == len(epochs)
    for epoch in (2**32, -1):  # would alias another epoch
        with pytest.raises(IndexError, match=f"epoch {epoch} is not in"):
            order.batch(epoch, 0)


def test_numpys_narrow_integers_do_not_overflow():
    wide = Order(np.full(40, 50), seed=1, global_batch=20, window=4)
    narrow = Order(
        np.full(40, 50, np.int8), seed=np.int8(1), global_batch=np.int8(20), window=np.int8(4)
    )
    for epoch, number in itertools.product((0, 1, 100), (0, 7, 99)):
        got = narrow.batch(np.int8(epoch), np.int8(number))
        np.testing.assert_array_equal(got, wide.batch(epoch, number))


def test_ids_beyond_32_bits_in_shards_too_large_to_permute(monkeypatch):
    """Only the small shard's window is permuted; that of 3 billion samples would not fit in memory."""
    sizes = np.array([3_000_000_000, 64])
    order = Order(sizes, seed=0, global_batch=8, window=1)
    assert order.batches_per_epoch == 3_000_000_064 // 8
    epoch_of = {order._layout(epoch)[0][0]: epoch for epoch in range(20)}  # by first shard
    plain = orders._key
    for first, begin, window in ((0, 3_000_000_000 // 8, 1), (1, 0, 0)):

        def key(seed: int, epoch: int, stream: int, small: int = window) -> np.ndarray:
            assert stream in (0, small + 1)  # fails before 24 GB are allocated
            return plain(seed, epoch, stream)

        monkeypatch.setattr(orders, "_key", key)
        found = [order.batch(epoch_of[first], begin + i) for i in range(8)]
        assert sorted(np.concatenate(found)) == list(range(3_000_000_000, 3_000_000_064))


# The same bytes through real readers.


@dataclass(frozen=True)
class Data:
    """Shards of odd sizes, and a view that differs by sample and view number."""

    spec: ReaderSpec
    case: Case

    def wanted(self, epoch: int, number: int) -> tuple[np.ndarray, ...]:
        """The global batch by the reference order, read by one reader in a single request."""
        ids = np.array(self.case.plain(epoch)[number])
        got = Reader(self.spec).read(Request(ids, epoch))
        assert got.valid.all()
        return got.images, got.labels, got.ids


SHARDS = (1, 17, 9, 30, 1, 12, 25, 1, 24)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ReaderSpec:
    folder = tmp_path_factory.mktemp("sequence")
    ends = np.cumsum([0, *SHARDS])
    images, labels = random_images(int(ends[-1]), 20, 20), np.arange(ends[-1]) % 5
    paths: list[Path] = []
    for number, (first, last) in enumerate(itertools.pairwise(ends)):
        rows, keys = slice(first, last), [f"s-{i:04d}" for i in range(first, last)]
        paths += make_shards(
            folder,
            images[rows],
            labels[rows],
            shard_size=last - first,
            prefix=f"shard-{number}",
            keys=keys,
        )
    index(paths, progress=False).save(folder / "m.arrow")
    assert Manifest.load(folder / "m.arrow").shard_sizes.tolist() == list(SHARDS)
    return ReaderSpec(str(folder / "m.arrow"), ViewSpec("crop_flip", 16, seed=3))


@pytest.fixture(params=["whole", "parts"])
def data(shards, request) -> Data:
    parts = None
    if request.param == "parts":
        part = np.random.default_rng(0).permutation(np.arange(sum(SHARDS)) % 9)
        parts = tuple(np.flatnonzero(part == p) for p in range(9))
    return Data(shards, Case(SHARDS, 11, 24, 3, parts))


@dataclass(frozen=True)
class Way:
    """Ranks, readers and accumulation with which a range of the sequence is run."""

    world: int
    readers: int
    accumulation: int
    backend: str = "local"
    prefetch: int = 3


def run(data: Data, way: Way, places: list[tuple[int, int]]) -> list[tuple[np.ndarray, ...]]:
    """Global batches at (epoch, number), assembled from all ranks' pools, each row in its place.

    Every pool is asked for one more step than is consumed: requests in flight are dropped.
    """
    order = data.case.order()
    order.check_ranks(way.world, way.accumulation)

    def requests(rank: int):
        for epoch, number in itertools.chain(places, places[-1:]):
            for piece in order.micro_batches(epoch, number, rank, way.world, way.accumulation):
                yield Request(np.ascontiguousarray(piece), epoch)

    how = {"backend": way.backend, "workers": way.readers, "prefetch": way.prefetch}
    found, in_place = [], np.argsort(places_of(order, way.world, way.accumulation))
    with ExitStack() as stack:
        pools = [stack.enter_context(ReaderPool(data.spec, **how)) for _ in range(way.world)]
        loops = [pool.batches(requests(rank)) for rank, pool in enumerate(pools)]
        for _ in places:
            step = [next(loop) for loop in loops for _ in range(way.accumulation)]
            columns = zip(*((b.images, b.labels, b.ids) for b in step), strict=True)
            found.append(tuple(np.concatenate(column)[in_place] for column in columns))
        for loop in loops:
            loop.close()
    return found


def assert_wanted(data: Data, places, found) -> None:
    for place, got in zip(places, found, strict=True):
        for left, right in zip(got, data.wanted(*place), strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


def test_a_run_goes_on_with_the_same_bytes_at_other_ranks_readers_and_accumulation(data):
    last = data.case.order().batches_per_epoch
    places = [(e, i) for e in (0, 1, 2) for i in range(last)]
    ways = [Way(4, 1, 2), Way(1, 16, 3), Way(8, 3, 1), Way(2, 3, 4)]
    cuts = [0, 2, last, last + 1, len(places)]  # within an epoch, at its end, after its first
    found = []
    for way, first, after in zip(ways, cuts, cuts[1:], strict=False):
        found += run(data, way, places[first:after])
    assert_wanted(data, places, found)
