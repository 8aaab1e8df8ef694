"""What a training records of its conditions, and when it warns."""

from __future__ import annotations

from cnn2gnn_dist.stages.shared.conditions import Conditions


def test_a_condition_that_changes_between_attempts_is_reported() -> None:
    first = Conditions()
    assert first.note("pools", 0, 16) is None
    assert first.note("norms", 0, None) is None  # no BatchNorm
    again = Conditions.of({**first.seen, "cursor": {}})
    assert again.note("pools", 8, 16) is None
    said = again.note("pools", 8, 32)
    assert said is not None
    assert "among the 32 of a micro-batch, among 16 until step 8" in said
    assert again.seen == {"precisions": [], "norms": [], "pools": [[0, 16], [8, 32]]}


def test_checkpoints_of_earlier_versions_have_fewer_kinds() -> None:
    found = Conditions.of({"norms": [[0, 64]]})
    assert found.note("pools", 5, 32) is None
    assert found.note("norms", 5, 64) is None
