"""An order of some of the samples: those with a label, for the teacher."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.errors import UserError
from tests.support.examples import examples

BATCH = 8


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.integers(0, 30), max_size=9), st.integers(1, 9), st.integers(0, 99))
def test_some_samples_only_are_those_of_the_whole_order(sizes, window, seed):
    """The epoch's permutation without the others, cut into batches anew; a rank's rows are contiguous in them."""
    sizes_S, rng = np.array([*sizes, 8]), np.random.default_rng(seed)
    total = int(sizes_S.sum())
    picked = int(rng.integers(BATCH, total + 1))
    only_N = rng.permutation(total) < picked
    whole = Order(sizes_S, seed=seed, global_batch=1, window=window)
    some = Order(sizes_S, seed=seed, global_batch=BATCH, window=window, only=only_N)
    assert some.batches_per_epoch == picked // BATCH
    for epoch in (0, 5):
        ids = np.concatenate([whole.batch(epoch, number) for number in range(total)])
        wanted = ids[only_N[ids]]
        for number in range(some.batches_per_epoch):
            rows = wanted[number * BATCH :][:BATCH]
            np.testing.assert_array_equal(some.batch(epoch, number), rows)
            ranks = [some.rank_batch(epoch, number, rank, 4) for rank in range(4)]
            np.testing.assert_array_equal(np.concatenate(ranks), rows)
    every = Order(sizes_S, seed=seed, global_batch=BATCH, window=window)
    assert some.digest != every.digest


def test_some_samples_must_fill_a_batch_and_fit_the_shards():
    sizes = np.array([6, 4])
    with pytest.raises(UserError, match="3 samples are fewer than one global batch of 4"):
        Order(sizes, seed=0, global_batch=4, window=1, only=np.arange(10) < 3)
    for wrong in (
        {"only": np.ones(9, bool)},
        {"only": np.ones(10, bool), "parts": [np.arange(10)]},
    ):
        with pytest.raises(ValueError, match="only"):
            Order(sizes, seed=0, global_batch=2, window=1, **wrong)
