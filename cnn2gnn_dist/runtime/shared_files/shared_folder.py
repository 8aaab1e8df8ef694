"""Is the run's folder the same one on every host? Asked with a new name, before anything is trained.

A folder that exists on every host, but is not the same one, goes unnoticed until a rank misses what another
has written: after the complete first training.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives, exchange, members
from cnn2gnn_dist.runtime.hosts import host_checks

SECONDS = 10.0
"""Seconds for a new name to appear on another host: clients ask the server at once for names never seen before."""
PREFIX = ".lock-probe-"
"""Files with such names don't count as contents of a run's folder (``ledger.check_claim``)."""


def check(root: Path) -> None:
    """Check that all hosts write into the same folder, and see what the others write (collective).

    Rank 0 creates a file of a random name; one rank of every other host waits for it and answers with
    another file, for which rank 0 waits. Takes 10 ms; nothing is done where all ranks are on one host.

    Raises:
        UserError: on every rank, naming the hosts where that fails, or where the folder doesn't answer.
    """
    if not members.on_several_hosts():
        return
    rank, world_size = collectives.rank(), collectives.world_size()
    name: str = collectives.broadcast_object(PREFIX + secrets.token_hex(8))
    answering = [r for r in range(1, world_size) if members.speaks_for_host(r)]
    where = f"run.dir={root}"

    def step(who: list[int], look: Callable[[], None]) -> None:
        exchange.every_rank(lambda: host_checks.in_time(look, where) if rank in who else None)

    try:
        step([0], lambda: _write(root / name))
        step(answering, lambda: _answer(root, name, rank))
        step([0], lambda: _read(root, name, answering))
    finally:
        if rank == 0:
            with contextlib.suppress(UserError):  # that the folder doesn't answer has been reported
                host_checks.in_time(lambda: _clear(root, name, answering), where)


def _clear(root: Path, name: str, answering: list[int]) -> None:
    for path in [root / name, *(root / f"{name}-{rank}" for rank in answering)]:
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        root.rmdir()  # the folder of a run that has not begun


def _write(path: Path) -> None:
    with _reported(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _answer(root: Path, name: str, rank: int) -> None:
    if not members.wait_until((root / name).exists, SECONDS):
        raise UserError(
            "this folder is not the one that rank 0 sees"
            if root.is_dir()
            else "this folder is missing",
            where=f"run.dir={root}",
            remedy="a folder on storage that all hosts mount at this path",
        )
    with _reported(root):
        (root / f"{name}-{rank}").touch()


def _read(root: Path, name: str, answering: list[int]) -> None:
    def unseen() -> list[int]:
        return [rank for rank in answering if not (root / f"{name}-{rank}").exists()]

    if not members.wait_until(lambda: not unseen(), SECONDS):
        hosts = ", ".join(members.name_of(rank) for rank in unseen())
        raise UserError(
            f"what {hosts} writes into this folder is not seen",
            where=f"run.dir={root}",
            remedy="a folder on storage that all hosts mount at this path",
        )


@contextlib.contextmanager
def _reported(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"this folder can't be written to: {error.strerror}",
            where=f"run.dir={root}",
            remedy="a folder on storage that all hosts mount at this path and that you can write to",
        ) from None
