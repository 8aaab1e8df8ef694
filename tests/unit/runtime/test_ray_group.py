"""How the end of a group of ranks under Ray is classified: a user's mistake, a lost rank, or a bug."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from cnn2gnn_dist.errors import FolderInUse, PeerFailed, PeerLost, UserError
from cnn2gnn_dist.runtime.ray import group as ray_group
from cnn2gnn_dist.runtime.ray.group import GroupSpec, LostRank, verdict


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("run", f"{type(cause).__name__}: {cause}", cause)


def test_a_rank_that_was_killed_for_memory_is_a_lost_one() -> None:
    found = verdict(
        [OutOfMemoryError("Task was killed due to the node running low on memory.\nTo disable")],
        False,
    )
    assert isinstance(found, LostRank)
    assert "low on memory" in str(found)


def test_a_mistake_counts_before_what_follows_from_it() -> None:
    mistake = UserError("no room", where="run.dir")
    assert verdict([ActorDiedError(), raised(PeerLost("gone")), raised(mistake)], True) is mistake


def test_a_lost_peer_is_a_lost_rank_and_a_bug_is_none() -> None:
    assert isinstance(verdict([raised(PeerLost("rank 1 is gone"))], False), LostRank)
    assert isinstance(verdict([raised(ValueError("bug"))], unanswered=True), LostRank)
    bug, consequence = raised(ValueError("bug")), raised(RuntimeError("Connection closed by peer"))
    assert verdict([consequence, bug], False) is bug


def test_a_bug_that_the_others_know_of_is_not_retried() -> None:
    bug, told = raised(ValueError("bug")), PeerFailed("rank 1 on node-b: ValueError: bug")
    assert verdict([raised(told), raised(PeerLost("rank 1 is gone")), bug], False) is bug
    assert verdict([raised(told)], unanswered=True) is told
    assert isinstance(verdict([raised(told), bug, ActorDiedError()], False), LostRank)


def attempts(monkeypatch: pytest.MonkeyPatch, *ends: Exception | list) -> list:
    """What a group returns or raises whose attempts end like this."""
    left = list(ends)

    def attempt(*_: object) -> list:
        if isinstance(end := left.pop(0), Exception):
            raise end
        return end

    monkeypatch.setattr(ray_group, "_attempt", attempt)
    found = ray_group.run_group("a:b", {}, GroupSpec(2, max_failures=2, wait_s=600.0))
    assert not left
    return found


def test_a_lost_rank_may_hold_the_folder_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host is cut off, so that Ray has replaced it, but it waits in a collective until that fails."""
    lost, held = LostRank("gone"), FolderInUse("another process is using this folder")
    assert attempts(monkeypatch, lost, held, held, held, [1, 2]) == [1, 2]
    assert attempts(monkeypatch, lost, lost, held, [1, 2]) == [1, 2]
    with pytest.raises(FolderInUse):  # another run does
        attempts(monkeypatch, held)
    with pytest.raises(UserError, match="lost a rank 3 times; last: gone"):
        attempts(monkeypatch, lost, held, lost, lost)
