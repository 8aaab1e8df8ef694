"""Errors of single ranks, told to all: every rank ends with the same one, which names rank and host.

A rank that stops alone leaves the others in a collective, where they learn only that it is gone.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed as dist

from cnn2gnn_dist.errors import PeerLost, Preempted, UserError
from cnn2gnn_dist.runtime import collectives, members

T = TypeVar("T")

WAIT_S = 4.0
"""Seconds for which a rank that ends waits for the others' words."""


def every_rank(work: Callable[[], T]) -> list[T]:
    """Every rank does this, however long it takes; results in rank order, on every rank (collective).

    Raises:
        UserError: some ranks raised one: each with its rank and host, on every rank.
    """  # noqa: DOC501
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
        raise members.together(wrong, len(told))
    return [one for one, _ in told]


class LastWords:
    """What each rank of the current group ends with, left in its store for the others.

    Made when the group has been formed; without a group nobody is told.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self._store: Any = None
        if self.world_size > 1:
            whole = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("last-words", whole)
        self._said = False

    def say(self, error: UserError) -> None:
        """Leave an error of this rank."""
        if (
            self._store is not None
            and not isinstance(error, PeerLost | Preempted)
            and not self._said
        ):
            self._leave(error)

    def others(self) -> UserError | None:
        """The errors that other ranks have left, as one, when a peer is gone; None: there are none."""
        if self._store is None:
            return None
        found = _within(WAIT_S, self._read) or {}
        self._leave(None)
        if not found:
            return None
        return members.together([(_member(r), e) for r, e in found.items()], self.world_size)

    def heard_by_rank_0(self) -> bool:
        """Whether rank 0 will report what this rank has left; call it when the group is left.

        Rank 0, with whose process the store often ends, waits here for the others to read its words.
        """
        if not self._said or self._store is None:
            return False
        keys = [str(rank) for rank in range(self.world_size)] if self.rank == 0 else ["0"]
        heard = _within(WAIT_S, lambda: self._store.wait(keys) or True)
        return bool(heard) and self.rank != 0

    def _leave(self, error: UserError | None) -> None:
        self._said = True
        _within(WAIT_S, lambda: self._store.set(str(self.rank), pickle.dumps(error)))

    def _read(self) -> dict[int, UserError]:
        found: dict[int, UserError] = {}

        def look() -> bool:
            for rank in range(self.world_size):
                if rank not in found and self._store.check([str(rank)]):
                    error = pickle.loads(self._store.get(str(rank)))
                    if error is not None:
                        found[rank] = error
            return bool(found)

        members.wait_until(look, WAIT_S / 2)
        return found


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
