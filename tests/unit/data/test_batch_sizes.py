"""The arithmetic of batches: shares of partitions, micro-batches, and sizes that do not divide evenly."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cnn2gnn_dist import settings as configs
from cnn2gnn_dist.data.batch_sizes import (
    check_arithmetic,
    check_parts,
    check_sizes,
    micro_batches,
    shares_of,
)
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.stages.shared import preflight
from tests.support.examples import examples
from tests.support.reference_order import SIZES, parts_of


@settings(max_examples=examples(200), deadline=None)
@given(counts=st.lists(st.integers(0, 1000), min_size=1, max_size=12), total=st.integers(1, 500))
@example(counts=[100, 95, 1, 1, 1, 1], total=9)  # the large ones give rows to the small: 3, 2, 1 …
def test_shares(counts, total):
    alive = sum(c > 0 for c in counts)
    if not alive:
        with pytest.raises(ValueError, match="shares of"):
            shares_of(counts, total)
        return
    if alive > total:
        with pytest.raises(UserError):
            shares_of(counts, total)
        return
    shares = shares_of(counts, total)
    assert sum(shares) == total
    for count, share in zip(counts, shares, strict=True):
        assert (share >= 1) == (count > 0)
    exact = [c / sum(counts) * total for c in counts]
    if all(e >= 1 or e == 0 for e in exact):  # plain largest remainder: off by less than one
        assert all(abs(s - e) < 1 for s, e in zip(shares, exact, strict=True))
    # The rows beyond the floors go where the most is missing: moving any row would not help.
    over = [s - e for s, e, count in zip(shares, exact, counts, strict=True) if count]
    givers = [o for o, s in zip(over, filter(None, shares), strict=True) if s > 1]
    assert all(giver - min(over) <= 1 + 1e-9 for giver in givers)


def test_of_equal_remainders_the_first_get_more():
    """The order of a run depends on this."""
    assert shares_of([1, 1, 1], 4) == [2, 1, 1]
    assert shares_of([1, 1, 1, 1], 6) == [2, 2, 1, 1]


@settings(deadline=None)
@given(count=st.integers(0, 40), accumulation=st.integers(0, 9))
def test_micro_batches(count, accumulation):
    if not 1 <= accumulation <= count:
        with pytest.raises(UserError) as caught:
            micro_batches(np.arange(count), accumulation)
        assert f"a rank's {count} samples" in caught.value.what
        assert f"into {accumulation} micro-batches" in caught.value.what
        return
    pieces = micro_batches(np.arange(count), accumulation)
    assert len(pieces) == accumulation
    np.testing.assert_array_equal(np.concatenate(pieces), np.arange(count))
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@settings(max_examples=examples(150), deadline=None)
@given(sizes=SIZES, data=st.data())
def test_micro_batches_have_equal_shares_of_every_part(sizes, data):
    """BatchNorm treats a micro-batch as a sample of the data: none may come from one partition alone."""
    total = sum(sizes)
    count = data.draw(st.integers(1, min(6, total)), label="parts")
    parts = parts_of(total, count, data.draw(st.integers(0, 99)))
    batch = data.draw(st.integers(sum(len(p) > 0 for p in parts), total), label="global batch")
    order = Order(np.array(sizes), seed=3, global_batch=batch, window=2, parts=parts)
    world = data.draw(st.integers(1, count), label="ranks")
    accumulation = data.draw(st.integers(1, batch), label="accumulation")
    try:
        order.check_ranks(world, accumulation)
    except UserError:
        return
    whole = order.batch(0, 0)
    ranks = [order.micro_batches(0, 0, rank, world, accumulation) for rank in range(world)]
    for rank, pieces in enumerate(ranks):
        mine = order.rank_batch(0, 0, rank, world)
        assert len(pieces) == accumulation
        sizes_of = [len(piece) for piece in pieces]
        assert max(sizes_of) - min(sizes_of) <= 1
        assert min(sizes_of) >= 1
        np.testing.assert_array_equal(np.sort(np.concatenate(pieces)), np.sort(mine))
        if accumulation == 1:
            np.testing.assert_array_equal(pieces[0], mine)
        for part in parts:
            held = [int(np.isin(piece, part).sum()) for piece in pieces]
            assert max(held) - min(held) <= 1
        again = order.micro_batches(0, 0, rank, world, accumulation)
        assert [piece.tolist() for piece in again] == [piece.tolist() for piece in pieces]
    # The union over ranks does not depend on their number: row g of the global batch is in micro-batch g mod A.
    for number in range(accumulation):
        together = np.concatenate([pieces[number] for pieces in ranks])
        np.testing.assert_array_equal(together, whole[number::accumulation])


def test_check_arithmetic():
    check_arithmetic(96, 3, 4)
    check_arithmetic(1, 1, 1)
    with pytest.raises(UserError) as caught:
        check_arithmetic(100, 3, 4)
    assert "100 is not 3 ranks x 4" in caught.value.what
    assert "96 or 108" in caught.value.remedy
    with pytest.raises(UserError):
        check_arithmetic(0, 1, 1)
    for world, accumulation in ((0, 1), (1, 0), (-2, -2)):
        with pytest.raises(UserError, match=f"{world} ranks x {accumulation} micro-batches"):
            check_arithmetic(8, world, accumulation)


def test_check_sizes():
    check_sizes(1, 1, 1, 1)
    for batch, window in ((0, 1), (1, 0), (0, 0)):
        with pytest.raises(UserError, match="both must be 1 or more"):
            check_sizes(8, 1, batch, window)


def test_check_parts():
    check_parts(8, 8, 8)
    check_parts(3, 1)
    for parts, world in ((2, 3), (0, 1), (2, 0)):
        with pytest.raises(UserError, match=f"{parts} partitions can't be shared by {world} ranks"):
            check_parts(parts, world, 100)
    with pytest.raises(UserError, match="9 partitions share a global batch of 8"):
        check_parts(9, 2, 8)


def test_ranks_with_too_few_rows_are_named_with_their_parts():
    sizes = [30, 30, 30, 3, 3, 0, 0]
    parts = np.split(np.arange(96), np.cumsum(sizes)[:-1])
    order = Order(np.full(12, 8), seed=0, global_batch=16, window=4, parts=parts)
    assert order.shares == [4, 5, 5, 1, 1, 0, 0]
    order.check_ranks(1, 16)
    order.check_ranks(2, 1)
    with pytest.raises(UserError) as caught:  # one empty micro-batch
        order.check_ranks(2, 2)
    assert "rank 1 of 2 gets 1 of the 16 rows" in caught.value.what
    assert "partitions 4 to 6 have shares 1 + 0 + 0)" in caught.value.what
    with pytest.raises(UserError) as caught:  # no rows at all
        order.rank_batch(0, 0, 0, 6)
    assert "rank 4 of 6 gets 0 of the 16 rows" in caught.value.what
    assert "partitions 5 to 5 have shares 0)" in caught.value.what
    assert "global_batch" in caught.value.where


@pytest.mark.parametrize(
    ("world", "change", "what"),
    [
        (3, "teacher.global_batch=63", "a global batch of 64 does not divide evenly over 3 ranks"),
        (2, "student.global_batch=33", "a global batch of 33 does not divide evenly over 2 ranks"),
        (4, "graph.partition.parts=3", "3 partitions can't be shared by 4 ranks"),
        (1, "graph.partition.parts=65", "65 partitions share a global batch of 64"),
    ],
)
def test_a_config_that_does_not_fit_the_ranks_is_refused_before_the_first_stage(
    world, change, what
):
    stages = ("pack", "teacher", "student")
    config = configs.load("demo", [change])
    with pytest.raises(UserError, match=what):
        preflight.check(config, stages, world)
    preflight.check(config, ["pack", "evaluate"], world)  # evaluates what other ranks trained
    preflight.check(configs.load("demo", [change, "graph.scope=batch"]), ["teacher"], 1)
    preflight.check(configs.load("demo", ["graph.partition.parts=4"]), stages, 4)


def test_many_small_parts_leave_one_sample_to_the_large_ones():
    """Two excess samples are taken from two partitions, not from one."""
    assert shares_of([1, 1, 1, 50, 47], 5) == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(("batch", "nearest"), [(5, "4 or 8"), (3, "4"), (0, "4")])
def test_a_batch_that_does_not_divide_gets_the_nearest_that_does(batch, nearest):
    with pytest.raises(UserError) as caught:
        check_arithmetic(batch, 2, 2)
    assert caught.value.remedy == f"use a multiple of 4: {nearest}"


@pytest.mark.parametrize(("batch", "most"), [(127, 64), (8, 1), (1, 256)])
def test_a_student_is_not_trained_on_one_image_at_a_time(batch, most):
    """Its readout has a BatchNorm, which torch refuses then; two ranks see two images."""

    def of(batch, most):
        how = [f"student.global_batch={batch}", f"student.max_micro_batch={most}"]
        return configs.load("demo", [*how, "graph.partition.parts=1"])

    with pytest.raises(UserError, match="micro-batches of one image") as raised:
        preflight.check(of(batch, most), ["student"], 1)
    numbers = re.findall(r"batch=(\d+)", raised.value.remedy)
    preflight.check(of(*map(int, numbers)), ["student"], 1)
    preflight.check(of(2 * batch, most), ["control"], 2)
