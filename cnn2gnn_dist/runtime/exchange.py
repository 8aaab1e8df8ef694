"""Errors of single ranks, told to all: every rank ends with the same one, which names rank and host.

A rank that stops alone leaves the others in a collective, where they learn only that it is gone.
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

from cnn2gnn_dist.errors import PeerLost, Preempted, UserError
from cnn2gnn_dist.runtime import collectives, members

T = TypeVar("T")

WAIT_S = 4.0
"""Seconds for which a rank that ends waits to be heard."""
POLL_S, BEAT_S = 0.5, 2.0


def every_rank(work: Callable[[], T]) -> list[T]:
    """Every rank does this, however long it takes; results in rank order, on every rank (collective).

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
    told = collectives.all_gather_object((result, problem))
    wrong = [(_member(rank), error) for rank, (_, error) in enumerate(told) if error is not None]
    if wrong:
        everyones = members.together(wrong, len(told))
        everyones.told = True
        raise everyones
    return [one for one, _ in told]


class LastWords:
    """What a rank of the current group ends with, told to the others through the group's store.

    Nothing wakes a rank from a collective but the end of the process that it waits for, and the store
    often ends with that of rank 0. So a thread of each rank listens, and a rank with an error ends when
    it has been heard. Without a group nobody is told.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self._found: dict[int, UserError] = {}
        self._over, self._listened = threading.Event(), threading.Event()
        self._store: Any = None
        if self.world_size > 1:
            whole = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("last-words", whole)
            threading.Thread(target=self._listen, name="last words", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._over.set()

    def say(self, error: UserError) -> bool:
        """Tell the others of an error of this rank, or of all; wait until they have heard.

        Returns whether rank 0 reports it, or one like it.
        """
        if self._store is None or error.told or isinstance(error, PeerLost | Preempted):
            return error.told
        _within(WAIT_S, lambda: self._tell(error))
        waiting = [r for r in range(self.world_size) if r != self.rank] if self.rank == 0 else [0]
        heard = _within(WAIT_S, lambda: self._store.wait([f"heard/{r}" for r in waiting]) or True)
        if self.rank == 0 or not heard:
            return False
        # A rank 0 without an error of its own is killed by torchrun as soon as this one has ended.
        own = _within(WAIT_S, lambda: self._store.check(["0"]))
        return bool(own) or "TORCHELASTIC_RUN_ID" not in os.environ

    def others(self) -> UserError | None:
        """The errors of other ranks, as one, when a peer is gone; None: it had none."""
        if self._store is None:
            return None
        self._listened.wait(2 * POLL_S)  # it may have said it just now
        if not self._found:
            return None
        wrong = [(_member(rank), error) for rank, error in sorted(self._found.items())]
        found = members.together(wrong, self.world_size)
        found.told = True
        return found

    def silent(self) -> str:
        """The ranks that have not been heard from, when a collective failed: ``rank 1 on node-b``."""
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

    def _tell(self, error: UserError) -> None:
        self._store.set(str(self.rank), pickle.dumps(error))
        self._store.set("said", "")
        if self.rank != 0:  # it ends with an error of its own: rank 0 need not wait for it
            self._store.set(f"heard/{self.rank}", "")

    def _listen(self) -> None:
        with contextlib.suppress(Exception):  # the store is gone
            store = self._store.clone()
            beats, due = 0, 0.0
            while not self._over.wait(POLL_S):
                if time.monotonic() >= due:
                    beats, due = beats + 1, time.monotonic() + BEAT_S
                    store.set(f"alive/{self.rank}", str(beats))
                if not store.check(["said"]):
                    continue
                for rank in range(self.world_size):
                    if rank != self.rank and rank not in self._found and store.check([str(rank)]):
                        self._found[rank] = pickle.loads(store.get(str(rank)))
                        self._listened.set()
                store.set(f"heard/{self.rank}", "")


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """The result of the work; None if it fails or is not done in time: a store may be gone, or not answer."""
    made: list[T] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            made.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return made[0] if made else None


def _member(rank: int) -> members.Member:
    there = members.present()
    return there[rank] if rank < len(there) else members.Member.here(rank)
