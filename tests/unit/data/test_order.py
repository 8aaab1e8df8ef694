"""The order: every sample at most once per epoch, the same for any number of ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn2gnn_dist import settings as configs
from cnn2gnn_dist.data.order import MOST_EPOCHS, Order, sequential
from cnn2gnn_dist.errors import UserError
from tests.support.examples import examples
from tests.support.reference_order import SIZES, parts_of, plain_order


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    """The global batches [batches, G] of one epoch."""
    return np.stack([order.batch(epoch, i) for i in range(order.batches_per_epoch)])


@settings(max_examples=examples(150), deadline=None)
@given(sizes=SIZES, data=st.data())
def test_every_sample_at_most_once_an_epoch(sizes, data):
    total = sum(sizes)
    count = data.draw(st.integers(0, min(4, total)), label="parts")
    parts = parts_of(total, count, data.draw(st.integers(0, 99)))
    least = sum(len(p) > 0 for p in parts or [()])
    batch = data.draw(st.integers(max(least, 1), total), label="global batch")
    window, seed = data.draw(st.integers(1, 14)), data.draw(st.integers(0, 2**63))
    order = Order(np.array(sizes), seed=seed, global_batch=batch, window=window, parts=parts)
    assert order.batches_per_epoch >= 1
    for epoch in (0, 7):
        shown = epoch_of(order, epoch)
        assert shown.shape == (order.batches_per_epoch, batch)
        assert shown.dtype == np.int64
        assert len(np.unique(shown)) == shown.size
        assert 0 <= shown.min() <= shown.max() < total
        plain = plain_order(sizes, seed, epoch, window)
        if parts is None:
            assert order.batches_per_epoch == total // batch
            np.testing.assert_array_equal(shown.reshape(-1), plain[: shown.size])
            continue
        bounds = np.cumsum([0, *order.shares])
        for part, share, first in zip(parts, order.shares, bounds, strict=False):
            sequence = plain[np.isin(plain, part)]
            np.testing.assert_array_equal(
                shown[:, first : first + share].reshape(-1),
                sequence[: share * len(shown)],
            )


GRID = list(
    itertools.product(
        ([40], [7, 0, 13, 20], [5] * 24), (1, 2, 4), (4, 12, 40), (1, 3, 100), (0, 4, 7)
    )
)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_ranks_share_every_batch_and_change_nothing(case):
    sizes, world, batch, window, count = case
    total = sum(sizes)
    parts = parts_of(total, count, seed=2)
    if count > batch:
        with pytest.raises(UserError, match="less than one sample each"):
            Order(np.array(sizes), seed=1, global_batch=batch, window=window, parts=parts)
        return
    order = Order(np.array(sizes), seed=1, global_batch=batch, window=window, parts=parts)
    for epoch, index in itertools.product((0, 3), range(order.batches_per_epoch)):
        whole = order.batch(epoch, index)
        rows = [order.rank_batch(epoch, index, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(rows), whole)
        if parts is None:
            assert {len(ids) for ids in rows} == {batch // world}
            continue
        owner = {p: p * world // count for p in range(count)}
        for rank, ids in enumerate(rows):
            mine = np.concatenate([parts[p] for p in owner if owner[p] == rank])
            assert np.isin(ids, mine).all()
            assert len(ids) == sum(order.shares[p] for p in owner if owner[p] == rank)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_any_batch_without_the_ones_before(count):
    sizes = np.array([9, 0, 30, 4, 4, 17, 21, 2] * 4)
    how = {"seed": 4, "global_batch": 8, "window": 2, "parts": parts_of(348, count, 1)}
    order = Order(sizes, **how)
    in_turn = {e: epoch_of(order, e) for e in (0, 1, 2)}
    places = [(e, i) for e in in_turn for i in range(order.batches_per_epoch)]
    np.random.default_rng(0).shuffle(places)
    jumping = Order(sizes, **how)
    for epoch, index in places:
        np.testing.assert_array_equal(jumping.batch(epoch, index), in_turn[epoch][index])
    for epoch, index in places[:10]:  # a fresh order, as after a restart
        np.testing.assert_array_equal(
            Order(sizes, **how).batch(epoch, index), in_turn[epoch][index]
        )


def test_sequential_access_permutes_each_window_once(monkeypatch):
    sizes = np.full(20, 50)
    # Shards and partitions sorted by class: each partition is at a different window.
    parts = list(np.arange(1000).reshape(10, 100))
    made = []
    plain = Order._divided
    monkeypatch.setattr(Order, "_divided", lambda self, ids: (made.append(1), plain(self, ids))[1])
    order = Order(sizes, seed=0, global_batch=20, window=1, parts=parts)
    epoch_of(order, 0)
    assert len(made) == 20


def test_epochs_and_seeds_differ_and_all_is_shown_in_time():
    sizes = np.full(10, 10)
    order = Order(sizes, seed=0, global_batch=7, window=3)
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    other = epoch_of(Order(sizes, seed=1, global_batch=7, window=3), 0)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert len(np.unique(first)) == 98  # 100 = 14 x 7 + 2
    # Different samples are skipped in each epoch: none is skipped forever.
    assert len(np.unique([epoch_of(order, e) for e in range(12)])) == 100


def test_the_digest_tells_apart_all_that_the_sequence_depends_on():
    how = {"seed": 1, "global_batch": 4, "window": 2}
    halves = [np.arange(8), np.arange(8, 16)]
    orders = [
        Order(np.array([8, 8]), **how),
        Order(np.array([8, 8]), **{**how, "seed": 2}),
        Order(np.array([8, 8]), **{**how, "seed": 2**63}),
        Order(np.array([8, 8]), **{**how, "global_batch": 5}),
        Order(np.array([8, 8]), **{**how, "window": 1}),
        Order(np.array([7, 9]), **how),
        Order(np.array([8, 8]), **how, parts=halves),
        Order(np.array([8, 8]), **how, parts=halves[::-1]),
    ]
    assert len({order.digest for order in orders}) == len(orders)
    assert Order(np.array([8, 8]), **how).digest == orders[0].digest


@pytest.mark.parametrize("count", [127, 128, 300, 33_000])
def test_as_many_parts_as_there_are(count):
    """Partition numbers are stored in as few bits as they need."""
    ids = np.random.default_rng(0).permutation(2 * count)
    order = Order(
        np.full(2, count), seed=0, global_batch=count, window=1, parts=list(ids.reshape(count, 2))
    )
    assert order.shares == [1] * count
    found = np.sort(np.stack([order.batch(0, 0), order.batch(0, 1)]), axis=0)
    np.testing.assert_array_equal(found, np.sort(ids.reshape(count, 2).T, axis=0))


def test_a_window_mixes_its_shards_and_no_others():
    order = Order(np.full(12, 10), seed=3, global_batch=30, window=3)
    for batch in epoch_of(order, 0):  # here a batch is exactly one window
        assert len(np.unique(batch // 10)) == 3
        assert (np.diff(batch) < 0).any()


def test_shuffling_is_even():
    """Positions of a sample over 4000 seeds: the limit is far beyond the 0.999 quantile of chi-squared (19 dof)."""
    places = [
        int(
            np.flatnonzero(
                Order(np.array([20]), seed=s, global_batch=20, window=1).batch(0, 0) == 3
            )[0]
        )
        for s in range(4000)
    ]
    counts = np.bincount(places, minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 50


def test_too_few_samples_are_counted_out():
    with pytest.raises(UserError) as caught:
        Order(np.array([5, 6]), seed=0, global_batch=16, window=2)
    assert "11 samples are fewer than one global batch of 16" in caught.value.what
    assert "11 // 16 = 0" in caught.value.what
    assert "11" in caught.value.remedy


def test_wrong_arguments():
    sizes = np.array([8, 8])
    for wrong in ({"global_batch": 0}, {"window": 0}):
        with pytest.raises(UserError):
            Order(sizes, **{"seed": 0, "global_batch": 4, "window": 1, **wrong})
    twice = [np.zeros(2, np.int64), np.arange(2, 16)]  # as many ids as samples, one of them missing
    for parts in ([np.arange(10), np.arange(8, 16)], [np.arange(15)], twice):
        with pytest.raises(ValueError, match="disjoint and cover"):
            Order(sizes, seed=0, global_batch=4, window=1, parts=parts)
    for parts in ([np.arange(17)], [np.arange(8), np.arange(-8, 0)]):
        with pytest.raises(ValueError, match=r"outside 0\.\.15"):
            Order(sizes, seed=0, global_batch=4, window=1, parts=parts)
    with pytest.raises(ValueError, match="negative number"):
        Order(np.array([9, -1]), seed=0, global_batch=4, window=1)
    order = Order(sizes, seed=0, global_batch=4, window=1)
    with pytest.raises(UserError, match="not 3 ranks"):
        order.rank_batch(0, 0, 0, 3)
    with pytest.raises(IndexError):
        order.batch(0, 4)
    for epoch in (-1, MOST_EPOCHS):
        with pytest.raises(IndexError, match=rf"epoch {epoch} is not in 0\.\."):
            order.batch(epoch, 0)
    two = Order(sizes, seed=0, global_batch=4, window=1, parts=[np.arange(8), np.arange(8, 16)])
    with pytest.raises(UserError, match="2 partitions can't be shared by 3 ranks"):
        two.rank_batch(0, 0, 0, 3)
    for either, rank in itertools.product((order, two), (-1, 2)):
        with pytest.raises(IndexError, match=f"rank {rank} of 2"):
            either.rank_batch(0, 0, rank, 2)
    for either, world in itertools.product((order, two), (0, -1)):
        with pytest.raises(UserError, match=f"{world} ranks"):
            either.rank_batch(0, 0, 0, world)


def test_eight_parts_in_micro_batches_of_eight():
    """One row of each partition; each micro-batch used to be eight rows of one partition."""
    parts = [np.arange(p * 40, p * 40 + 40) for p in range(8)]
    order = Order(np.array([320]), seed=0, global_batch=64, window=1, parts=parts)
    for piece in order.micro_batches(0, 2, 0, 1, 8):
        assert sorted(piece // 40) == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "batch", "shown"),
    [
        ([8000] * 8, 12, "75%"),  # shares of 2 and 1: docs/order.md
        ([8000] * 8, 65, None),  # 90.3 %
        ([8000] * 8, 64, None),
        ([20, 20, 20, 1], 4, "7%"),  # one batch
        ([30, 10], 4, None),
    ],
)
def test_an_epoch_that_leaves_out_many_samples_is_noted(sizes, batch, shown):
    ends = np.cumsum([0, *sizes])
    parts = [np.arange(first, last) for first, last in itertools.pairwise(ends.tolist())]
    order = Order(np.array([ends[-1]]), seed=0, global_batch=batch, window=1, parts=parts)
    note = order.short_epoch()
    assert (note is None) == (shown is None)
    if shown:
        assert f"an epoch shows {shown} of the images" in note
        seen = np.concatenate([order.batch(0, i) for i in range(order.batches_per_epoch)])
        assert f"{len(np.unique(seen)) / ends[-1]:.0%}" == shown
    assert Order(np.array([5, 5]), seed=0, global_batch=9, window=1).short_epoch() is None


@pytest.mark.parametrize(
    ("sizes", "accumulation", "most", "told"),
    [
        ([9000, 1000], 1, 256, "rank 0 holds 461 images at once, more than 256"),
        ([1000, 9000], 2, 128, "rank 1 holds 231 images at once, more than 128"),
        ([3000] * 3, 1, 256, "rank 0 holds 342 images at once"),  # two partitions of three
        ([5100, 4900], 1, 256, None),
        ([9000, 1000], 1, 512, None),
        ([2500] * 4, 2, 128, None),
    ],
)
def test_a_rank_that_holds_more_images_than_it_may_is_noted(sizes, accumulation, most, told):
    ends = np.cumsum([0, *sizes])
    parts = [np.arange(first, last) for first, last in itertools.pairwise(ends.tolist())]
    order = Order(np.array([ends[-1]]), seed=0, global_batch=512, window=1, parts=parts)
    note = order.uneven_ranks(2, accumulation, most)
    assert (note is None) == (told is None)
    if told:
        assert note.startswith(told)
        assert ("with a multiple of 2 partitions" in note) == (len(sizes) == 3)
        pieces = [p for r in (0, 1) for p in order.micro_batches(0, 0, r, 2, accumulation)]
        assert f"holds {max(map(len, pieces))} images" in note
    assert Order(np.array([512]), seed=0, global_batch=512, window=1).uneven_ranks(2, 1, 9) is None


def test_without_parts_two_ranks_hold_what_one_holds_in_two_micro_batches():
    order = Order(np.array([40, 24]), seed=0, global_batch=16, window=2)
    for number in range(order.batches_per_epoch):
        one = order.micro_batches(1, number, 0, 1, 4)
        two = [p for rank in (0, 1) for p in order.micro_batches(1, number, rank, 2, 2)]
        assert [piece.tolist() for piece in one] == [piece.tolist() for piece in two]


@settings(deadline=None)
@given(total=st.integers(1, 60), batch=st.integers(1, 12), world=st.integers(1, 5))
def test_sequential_covers_all_in_order(total, batch, world):
    ranks = [list(sequential(total, batch, rank, world)) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {-(-total // (batch * world))}
    seen = []
    for step in zip(*ranks, strict=True):
        for ids, mask in step:
            assert ids.shape == mask.shape == (batch,)
            assert ids.max() < total
            assert (ids[~mask] == total - 1).all()
            seen += ids[mask].tolist()
    assert seen == list(range(total))


def test_sequential_refuses():
    with pytest.raises(UserError, match="batches of 0"):
        sequential(10, 0, 0, 1)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(IndexError, match=f"rank {rank} of {world}"):
            sequential(10, 4, rank, world)
    assert list(sequential(0, 4, 1, 2)) == []


def test_seeds_that_not_all_random_numbers_can_take_are_refused():
    assert configs.load("demo", [f"seed={2**63 - 1}"]).seed == 2**63 - 1
    for seed in (2**63, -1):
        with pytest.raises(UserError) as caught:
            configs.load("demo", [f"seed={seed}"])
        assert caught.value.where == "seed"
