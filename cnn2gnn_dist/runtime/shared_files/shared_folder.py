"""Is the run's folder the same one on every host? Asked with a new name, before anything is trained.

A folder that exists on every host, but is not the same one, goes unnoticed until a rank misses what another
has written: after the complete first training.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives, exchange, members
from cnn2gnn_dist.runtime.hosts import host_checks

T = TypeVar("T")
SECONDS = 10.0
"""Seconds for a new name to appear on another host: clients ask the server at once for names never seen before."""
PREFIX = ".lock-probe-"
"""Files with such names don't count as contents of a run's folder (``ledger.check_claim``)."""


def check(root: Path, may_be_separate: bool = False) -> bool:
    """Check that all hosts write into the same folder, and see what the others write (collective).

    Rank 0 creates a file of a random name; one rank of every other host waits for it and answers with
    another file, for which rank 0 waits. Takes 10 ms; nothing is done where all ranks are on one host.

    Where folders may be separate, all these files are created at once: when no host has seen rank 0's in time,
    every other host's has existed for as long, and no host has asked for it before.

    Args:
        root: the same path on all hosts.
        may_be_separate: whether each host may instead have a folder of its own, which is then created.

    Returns:
        whether each host has one of its own: none of them sees what any other one writes.

    Raises:
        UserError: on every rank, naming the hosts where that fails, or where the folder doesn't answer.
    """
    if not members.on_several_hosts():
        return False
    rank, world_size = collectives.rank(), collectives.world_size()
    name: str = collectives.broadcast_object(PREFIX + secrets.token_hex(8))
    answering = [r for r in range(1, world_size) if members.speaks_for_host(r)]
    where, writing = f"run.dir={root}", [0, *answering] if may_be_separate else [0]
    clearing = list(writing)

    def step(who: list[int], look: Callable[[], T]) -> dict[int, T]:
        def one() -> T | None:
            return host_checks.in_time(look, where) if rank in who else None

        found = exchange.every_rank(one)
        return {r: value for r in who if (value := found[r]) is not None}

    try:
        step(writing, lambda: _write(root / _probe(name, rank)))
        sees = step(answering, lambda: _sees(root / name))
        if may_be_separate and not any(sees.values()):
            step(writing, lambda: _check_separate(root, name, rank, answering))
            return True
        step(answering, lambda: _answer(root, name, rank))
        step([0], lambda: _read(root, name, answering))
        clearing = [0]  # in the one folder, which the run may use from now on
        return False
    finally:
        if rank in clearing:
            with contextlib.suppress(UserError):  # that the folder doesn't answer has been reported
                host_checks.in_time(lambda: _clear(root, name, answering), where)


def _sees(path: Path) -> bool:
    with _reported(path.parent, "accessed"):
        return members.wait_until(path.exists, SECONDS)


def _check_separate(root: Path, name: str, rank: int, answering: list[int]) -> None:
    """Check that this host sees no other host's name: the names are new, so nobody has cached their absence."""
    others = [r for r in (0, *answering) if r != rank]
    with _reported(root, "accessed"):
        seen = [members.name_of(r) for r in others if (root / _probe(name, r)).exists()]
    if seen:
        raise UserError(
            f"this folder is shared with {', '.join(seen)}, but not with all hosts",
            where=f"run.dir={root}",
            remedy="a folder that all hosts share, or one on a disk of each host's own",
        )


def _probe(name: str, rank: int) -> str:
    """The name of the file that a rank creates."""
    return f"{name}-{rank}" if rank else name


def _clear(root: Path, name: str, answering: list[int]) -> None:
    for rank in (0, *answering):
        with contextlib.suppress(OSError):
            (root / _probe(name, rank)).unlink()
    with contextlib.suppress(OSError):
        root.rmdir()  # the folder of a run that has not begun


def _write(path: Path) -> None:
    with _reported(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _answer(root: Path, name: str, rank: int) -> None:
    with _reported(root, "accessed"):
        there = (root / name).exists()
    if not there:
        raise UserError(
            "this folder is not the one that rank 0 sees"
            if root.is_dir()
            else "this folder is missing",
            where=f"run.dir={root}",
            remedy="a folder on storage that all hosts mount at this path",
        )
    with _reported(root):
        (root / _probe(name, rank)).touch()


def _read(root: Path, name: str, answering: list[int]) -> None:
    def unseen() -> list[int]:
        return [rank for rank in answering if not (root / _probe(name, rank)).exists()]

    with _reported(root, "accessed"):
        all_seen = members.wait_until(lambda: not unseen(), SECONDS)
    if not all_seen:
        hosts = ", ".join(members.name_of(rank) for rank in unseen())
        raise UserError(
            f"what {hosts} writes into this folder is not seen",
            where=f"run.dir={root}",
            remedy="a folder on storage that all hosts mount at this path",
        )


@contextlib.contextmanager
def _reported(root: Path, how: str = "written to") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"this folder can't be {how}: {error.strerror}",
            where=f"run.dir={root}",
            remedy="a folder on storage that all hosts mount at this path and that you can write to",
        ) from None
