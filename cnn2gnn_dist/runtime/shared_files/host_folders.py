"""Whether the hosts of a run share its folder or have one each, and which rank acts for each folder.

With one folder rank 0 creates, renames and removes what is in it. With a folder on each host, the first rank
of every host does, and what one host writes reaches the others through a depot (``exchange_by_store``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from cnn2gnn_dist.runtime.group import collectives, exchange, members
from cnn2gnn_dist.runtime.shared_files.exchange_by_store import Depot

T = TypeVar("T")

_separate = False
_depot: Depot | None = None


def begin(separate: bool) -> None:
    """Record whether each host has a folder of its own; all ranks say the same."""
    global _separate
    _separate = separate


def use(depot: Depot) -> None:
    """Let hosts with folders of their own exchange files through this."""
    global _depot
    _depot = depot


def end() -> None:
    """Forget both: the group has ended."""
    global _separate, _depot
    _separate, _depot = False, None


def are_separate() -> bool:
    """Whether each host has a folder of its own."""
    return _separate


def depot() -> Depot:
    """Through what hosts with folders of their own exchange files."""
    assert _depot is not None, "the run's storage is opened before any stage"
    return _depot


def sharing(rank: int) -> list[int]:
    """The ranks that share a rank's folder, in ascending order; the first one acts for the folder."""
    if _separate:
        return members.on_host_of(rank)
    return list(range(max(collectives.world_size(), 1)))


def acts(rank: int) -> bool:
    """Whether a rank acts for its folder."""
    return sharing(rank)[0] == rank


def in_each(work: Callable[[], T]) -> T:
    """One rank for each folder does the work; all ranks get rank 0's result, or any rank's error (collective)."""
    if not _separate:
        return collectives.alone(work)
    rank = collectives.rank()
    found: list[T | None] = exchange.every_rank(lambda: work() if acts(rank) else None)
    first = found[0]
    return first  # type: ignore[return-value]
