"""Partitions of nodes without edges: those of what they resemble, as long as the partitions stay balanced."""

from __future__ import annotations

import numpy as np

from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.graph.partition.followers import Nearest, follow
from cnn2gnn_dist.training.accumulation import accumulation_for


def nearest(rows: list[list[int]], similarity: list[float]) -> Nearest:
    return Nearest(np.array(rows, np.int32), np.array(similarity, np.float32))


def test_the_most_similar_ones_stay_and_others_go_to_the_next_nearest_with_room():
    """Nodes 0 to 2 have edges, a partition each; the others all resemble node 0. A partition holds 3 of 8 nodes."""
    others = [[0, 1], [0, 2], [0, 1], [0, 2], [0, -1]]
    found = follow(
        np.array([0, 1, 2, -1, -1, -1, -1, -1]),
        nearest([[0, -1], [1, -1], [2, -1], *others], [1, 1, 1, 0.5, 0.9, 0.6, 0.7, 0.1]),
        3,
    )
    # 4 and 6 are most similar to 0; 5 and 3 find room with 1; 7 resembles nothing else: fewest are in 2.
    assert found.tolist() == [0, 1, 2, 1, 0, 1, 0, 2]


def test_those_that_resemble_nothing_fill_up_the_smallest_partitions():
    found = follow(np.array([0, 0, 0, 1, -1, -1, -1]), nearest([[-1]] * 7, [0] * 7), 3)
    assert sorted(np.bincount(found).tolist()) == [2, 2, 3]
    assert found[:4].tolist() == [0, 0, 0, 1]


def test_with_room_for_all_each_is_with_its_nearest():
    rng = np.random.default_rng(0)
    part = np.concatenate([np.arange(400) % 4, np.full(3600, -1)])
    ids = np.concatenate([np.arange(400), rng.permutation(np.arange(3600) % 400)])
    found = follow(part, Nearest(ids[:, None].astype(np.int32), np.ones(4000, np.float32)), 4)
    np.testing.assert_array_equal(found, part[ids])


def test_shares_of_ranks_stay_even_when_most_images_resemble_one_partition():
    """Nine of ten are near partition 0: a rank would get 461 of 512 images of a batch, the other 51."""
    rng = np.random.default_rng(0)
    count, nodes = 10_000, 1000
    part = np.where(np.arange(count) < nodes, np.arange(count) % 2, -1)
    ids = np.full((count, 8), -1, np.int32)
    ids[:, 0] = np.where(rng.random(count) < 0.1, 1, 0)
    ids[:nodes, 0] = np.arange(nodes)
    found = follow(part, Nearest(ids, rng.random(count).astype(np.float32)), 2)
    parts = [np.flatnonzero(found == number) for number in range(2)]
    order = Order(np.full(10, 1000), seed=0, global_batch=512, window=4, parts=parts)
    assert max(order.shares) <= 1.03 * 256 + 1
    accumulation = accumulation_for(512, 2, 4)
    assert accumulation == 64
    for rank in range(2):
        pieces = order.micro_batches(0, 0, rank, 2, accumulation)
        assert max(map(len, pieces)) <= 5
        assert min(map(len, pieces)) >= 3
