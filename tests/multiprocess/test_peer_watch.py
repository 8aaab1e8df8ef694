"""A lost rank is named, whatever the others are waiting in."""

from __future__ import annotations

import os
import re
import signal
import threading

import pytest
import torch.distributed as dist

from cnn2gnn_dist.errors import PeerLost, UserError
from cnn2gnn_dist.runtime.group import collectives, peer_watch
from cnn2gnn_dist.runtime.group.exchange import ErrorExchange
from cnn2gnn_dist.runtime.group.peer_watch import PeerWatch, SilenceTracker
from cnn2gnn_dist.training import engine
from tests.support import rank_group


def test_silence_is_the_time_since_a_note_changed() -> None:
    silence = SilenceTracker([0, 2], now=100.0)
    silence.note({0: b"1", 2: b"1"}, 101.0)
    silence.note({0: b"2", 2: b"1"}, 104.0)
    assert silence.since(106.0, limit=4.0) == {2: 5.0}
    assert silence.since(105.0, limit=4.0) == {}
    silence.note({0: b"3"}, 107.0)  # rank 2 has no heartbeat any more
    silence.note({2: b"5"}, 108.0)  # rank 2 is restarted
    assert silence.since(112.0, limit=4.0) == {0: 5.0}


def test_a_peer_that_never_came_is_silent_from_the_start() -> None:
    assert SilenceTracker([1], now=10.0).since(15.5, limit=5.0) == {1: 5.5}


def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def wait_for_the_dead(victim: int) -> str:
    """One rank is killed; the other waits in a call that the death of a peer does not end."""
    watch = PeerWatch(store(), collectives.rank(), 2, silence_s=3.0, beat_s=0.1)
    collectives.barrier()
    if collectives.rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(rank_group.GROUP_TIMEOUT_S)
    watch.close()
    return "never"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named(victim: int) -> None:
    """Rank 0 hosts the store: when it is lost nothing can be asked, and the message says that too."""
    outcomes = rank_group.launch(
        wait_for_the_dead, 2, victim, timeout=5 * rank_group.GROUP_TIMEOUT_S
    )
    assert outcomes[victim].returncode == -signal.SIGKILL
    survivor = outcomes[1 - victim]
    assert survivor.returncode == PeerLost.exit_code, survivor.output
    assert re.search(rf"rank {victim}( on \S+)? has not been heard from", survivor.output)
    assert ("rendezvous store does not answer" in survivor.output) == (victim == 0)


def wait_for_one_with_an_error(who: int) -> str:
    """One rank ends with an error; the other waits in a call that this does not end, as for a GPU."""
    watch, errors = (
        PeerWatch(store(), collectives.rank(), 2, silence_s=3.0, beat_s=0.1),
        ErrorExchange(),
    )
    watch.reason = errors.received
    collectives.barrier()
    if collectives.rank() == who:
        errors.publish(UserError("the disk is full", where="/scratch"))
        os._exit(2)
    threading.Event().wait(rank_group.GROUP_TIMEOUT_S)
    return "never"


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_ended_with_an_error_is_not_lost(who: int) -> None:
    outcomes = rank_group.launch(
        wait_for_one_with_an_error, 2, who, timeout=5 * rank_group.GROUP_TIMEOUT_S
    )
    assert [one.returncode for one in outcomes] == [2, 2], outcomes
    said = "the disk is full" in outcomes[1 - who].output
    assert said == (who == 1)  # one report for all, which is rank 0's


def silence_allowed() -> list[float]:
    return [watch._silence_s for watch in engine._watches]


def test_on_cpus_peers_are_given_up_only_after_their_collectives() -> None:
    """A rank that waits for a file learns of it in no other way."""
    allowed = 2 * rank_group.GROUP_TIMEOUT_S + peer_watch.SILENCE_S
    assert rank_group.run(silence_allowed, 2) == [[allowed]] * 2


def both_alive() -> bool:
    """Both ranks run until each has seen many heartbeats of the other; long silences would be reported."""
    told: list[UserError] = []
    watch = PeerWatch(store(), collectives.rank(), 2, silence_s=30.0, beat_s=0.01, lost=told.append)
    other = f"alive/{1 - collectives.rank()}"
    store().wait([other])
    while int(store().get(other)) < 20:
        pass
    collectives.barrier()
    watch.close()
    return not told


def test_living_ranks_are_left_alone() -> None:
    assert rank_group.run(both_alive, 2) == [True, True]
