"""Which rank the others wait for, and when this is reported."""

from __future__ import annotations

import pytest

from cnn2gnn_dist.runtime.group import members
from cnn2gnn_dist.runtime.group.members import Member
from cnn2gnn_dist.stages.shared import stragglers
from cnn2gnn_dist.stages.shared.stragglers import Stragglers


@pytest.fixture
def three(monkeypatch):
    hosts = [Member(rank, f"node-{'abc'[rank]}", "") for rank in range(3)]
    monkeypatch.setattr(members, "_present", tuple(hosts))


def test_the_slowest_is_compared_with_the_median_of_the_others():
    assert stragglers.slowest([1.0, 3.0]) == (1, 3.0)
    assert stragglers.slowest([8.0, 1.0, 2.0, 3.0]) == (0, 4.0)
    assert stragglers.slowest([2.0, 2.0])[1] == 1.0


def test_a_single_rank_waits_for_nobody():
    assert Stragglers().note([1.0], pytest.fail) == {}


def test_a_slow_rank_is_named_in_every_line_and_reported_once(three):
    said: list[str] = []
    found = Stragglers()
    for _ in range(3 * stragglers.IN_SUCCESSION):
        line = found.note([1.0, 1.0, 2.5], said.append)
        assert line == {"slowest": 2.5, "slowest_rank": 2, "slowest_host": "node-c"}
    (text,) = said
    assert text.startswith("rank 2 on node-c needs 2.5 times as long for its own work")


def test_a_passing_delay_is_not_reported(three):
    found = Stragglers()
    for _ in range(3):
        for _ in range(stragglers.IN_SUCCESSION - 1):
            found.note([3.0, 1.0, 1.0], pytest.fail)
        found.note([1.0, 1.1, 1.0], pytest.fail)
    for _ in range(2 * stragglers.IN_SUCCESSION):  # they take turns
        found.note([3.0, 1.0, 1.0], pytest.fail)
        found.note([1.0, 3.0, 1.0], pytest.fail)
