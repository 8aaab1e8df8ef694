"""Errors of single ranks, passed on to all: every rank ends with the same one, which names rank and host.

A rank that stops alone leaves the others in a collective, which fails without the reason.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed as dist

from cnn2gnn_dist.errors import PeerFailed, PeerLost, Preempted, UserError, first_line
from cnn2gnn_dist.runtime import bounded_wait
from cnn2gnn_dist.runtime.group import collectives, members
from cnn2gnn_dist.runtime.group.heartbeats import PeerRaised

T = TypeVar("T")

WAIT_S = 4.0
"""Seconds for which a rank with an error waits until the others have read it."""
POLL_S, BEAT_S = 0.5, 2.0


def every_rank(work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank, however long it takes; return the results in rank order (collective).

    Raises:
        UserError: some ranks raised one: each with its rank and host, on every rank.
    """
    result: Any = None
    problem: UserError | None = None
    with collectives.uneven():
        try:
            result = work()
        except UserError as error:
            problem = error
    outcomes = collectives.all_gather_object((result, problem))
    failed = [
        (_member(rank), error) for rank, (_, error) in enumerate(outcomes) if error is not None
    ]
    if failed:
        combined = members.combined_error(failed, len(outcomes))
        combined.shared = True
        raise combined
    return [one for one, _ in outcomes]


class ErrorExchange:
    """Passes the error that a rank ends with to the others, through the group's store.

    A rank that waits in a collective wakes only when the process it waits for exits, and the store
    often ends with rank 0. So a thread on each rank polls the store, and a rank with an error exits
    once the others have read it. Without a group it does nothing.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self._found: dict[int, UserError] = {}
        self._over, self._received = threading.Event(), threading.Event()
        self._store: Any = None
        if self.world_size > 1:
            whole = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("errors", whole)
            threading.Thread(target=self._poll, name="errors of other ranks", daemon=True).start()

    def close(self) -> None:
        """Stop polling."""
        self._over.set()

    def let_rank_0_report(self) -> None:
        """Before all ranks end with an error: wait until rank 0, which reports it, ignores requests to stop.

        A launcher sends it one as soon as another rank has ended (every rank calls this).
        """
        if self._store is None:
            return
        if self.rank == 0:
            _within(WAIT_S, lambda: self._store.set("reports", ""))
        else:
            _within(WAIT_S, lambda: self._store.wait(["reports"]))

    def publish(self, error: UserError) -> bool:
        """Pass an error of this rank, or of all ranks, to the others; wait until they have read it.

        Returns whether rank 0 reports it, or an equivalent one.
        """
        if self._store is None or error.shared or isinstance(error, PeerLost | Preempted):
            return error.shared
        _within(WAIT_S, lambda: self._write(error))
        waiting = [r for r in range(self.world_size) if r != self.rank] if self.rank == 0 else [0]
        read = _within(WAIT_S, lambda: self._store.wait([f"read/{r}" for r in waiting]) or True)
        if self.rank == 0 or not read:
            return False
        # A rank 0 without an error of its own is killed by torchrun as soon as this one has ended.
        own = _within(WAIT_S, lambda: self._store.check(["0"]))
        return bool(own) or "TORCHELASTIC_RUN_ID" not in os.environ

    def publish_bug(self, error: Exception) -> None:
        """Pass on an error of this rank that is not the user's, or the others would report a lost rank."""
        if not isinstance(error, PeerRaised):  # that one has reached all ranks
            name = type(error).__name__
            what = name if first_line(error) == name else f"{name}: {first_line(error)}"
            self.publish(PeerFailed(what, remedy="see the traceback in that rank's output"))

    def received(self) -> UserError | None:
        """The errors of other ranks, combined into one, when a peer is gone; None: there are none."""
        if self._store is None:
            return None
        self._received.wait(2 * POLL_S)  # it may have been written just now
        if not self._found:
            return None
        wrong = [(_member(rank), error) for rank, error in sorted(self._found.items())]
        found = members.combined_error(wrong, self.world_size)
        found.shared = True
        return found

    def silent(self) -> str:
        """The ranks whose heartbeats have stopped, when a collective failed: ``rank 1 on node-b``."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        if len(others) == 1:
            return members.name_of(others[0])
        first = _within(WAIT_S, self._beats)
        if first is None:
            return f"{members.name_of(0)}, or the network to it"
        time.sleep(2.5 * BEAT_S)
        second = _within(WAIT_S, self._beats) or first
        gone = [rank for rank in others if first.get(rank) == second.get(rank)]
        return ", ".join(members.name_of(rank) for rank in gone) or "all ranks answer again"

    def _beats(self) -> dict[int, bytes]:
        there = [r for r in range(self.world_size) if self._store.check([f"alive/{r}"])]
        return {rank: bytes(self._store.get(f"alive/{rank}")) for rank in there}

    def _write(self, error: UserError) -> None:
        self._store.set(str(self.rank), pickle.dumps(error))
        self._store.set("written", "")
        if self.rank != 0:  # it ends with its own error: rank 0 need not wait for it
            self._store.set(f"read/{self.rank}", "")

    def _poll(self) -> None:
        with contextlib.suppress(Exception):  # the store is gone
            store = self._store.clone()
            beats, due = 0, 0.0
            while not self._over.wait(POLL_S):
                if time.monotonic() >= due:
                    beats, due = beats + 1, time.monotonic() + BEAT_S
                    store.set(f"alive/{self.rank}", str(beats))
                if not store.check(["written"]):
                    continue
                for rank in range(self.world_size):
                    if rank != self.rank and rank not in self._found and store.check([str(rank)]):
                        self._found[rank] = pickle.loads(store.get(str(rank)))
                        self._received.set()
                store.set(f"read/{self.rank}", "")


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """The result of the work; None if it fails or is not done in time: a store may be gone, or not answer."""
    with contextlib.suppress(Exception):
        return bounded_wait.result(work, seconds)
    return None


def _member(rank: int) -> members.Member:
    there = members.present()
    return there[rank] if rank < len(there) else members.Member.here(rank)
