"""Which rank works on which node: consecutive ranks on a node, and each where it was before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cnn2gnn_dist.runtime.ray.rank_order import order

A, B, C = ("10.0.0.9", "f"), ("10.0.0.10", "e"), ("10.0.0.11", "d")


def test_ranks_of_a_node_are_neighbors_and_nodes_follow_their_addresses():
    places = [B, A, C, A, B]
    assert [places[place] for place in order(places)] == [A, A, B, B, C]


def test_a_rank_stays_on_its_node_and_another_takes_the_lost_one():
    before = [A, A, B, B]
    assert order([C, B, C, B], before) == [0, 2, 1, 3]
    assert order([B, A, B, A], before) == [1, 3, 0, 2]
    assert order([A, B, A], before) == [
        0,
        2,
        1,
    ]  # with another number of ranks, the order starts from scratch


NODES = st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=12)


@given(NODES, st.randoms(use_true_random=False))
def test_every_rank_has_a_place_of_its_own(places, chance):
    before = chance.choices([A, B, C], k=len(places))
    found = order(places, before)
    assert sorted(found) == list(range(len(places)))
    stayed = sum(places[place] == node for place, node in zip(found, before, strict=True))
    assert stayed == sum(min(places.count(node), before.count(node)) for node in {A, B, C})


@given(NODES, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_how_the_places_came(places, chance):
    shuffled = chance.sample(places, len(places))
    assert [places[p] for p in order(places)] == [shuffled[p] for p in order(shuffled)]
