"""Files, and parts of files, that hosts without a shared folder exchange through a store.

Every host says what it lacks, by size and SHA-256. What some host lacks, a host that has it leaves in the
store; all ranks then learn the object's name, and each host that lacks it fetches it, compares it, and puts it
in its place in one step. When all have it, the object is removed. What all hosts have is not transferred, and
what the store keeps anyway is fetched from there. All functions are collective; one rank of each host acts.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime import in_threads
from cnn2gnn_dist.runtime.group import collectives, exchange, members
from cnn2gnn_dist.runtime.shared_files import pieces
from cnn2gnn_dist.runtime.shared_files.pieces import Piece

_log = logging.getLogger(__name__)

Write = Callable[[bytes], object]


class Content(NamedTuple):
    """Bytes and hex SHA-256 of something that hosts exchange."""

    size: int
    sha256: str


class Depot(Protocol):
    """Where hosts leave objects for each other."""

    def kept(self, wanted: Mapping[str, Content]) -> dict[str, str]:
        """By name, objects with these contents that stay in the store anyway; called on rank 0 only."""

    def leave(self, content: Content, source: bytes | Path) -> str:
        """Write an object; return its name."""

    def fetch(self, name: str, size: int, write: Write) -> None:
        """Pass the first ``size`` bytes of an object to ``write``, in order."""

    def remove(self, name: str) -> None:
        """Remove an object that ``leave`` has written."""


class NowhereFound(UserError):
    """No host has what others need, and the store does not have it either."""


class Unfit(UserError):
    """An object is missing, or does not have the contents that were announced."""


class Side(Protocol):
    """What this host has of the things that are exchanged."""

    def lacks(self, name: str, wanted: Content) -> bool:
        """Whether it is missing here, or different."""

    def source(self, name: str) -> bytes | Path:
        """It as it is here."""

    def receive(self, name: str) -> AbstractContextManager[Write]:
        """Context manager that accepts it, and puts it in its place on exit without an error."""


class Files:
    """Complete files of a folder, which has the same path on all hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lacks(self, name: str, wanted: Content) -> bool:
        """Whether the file is missing here, or different (reads all of it)."""
        path = self.folder / name
        try:
            return path.stat().st_size != wanted.size or durable.sha256(path) != wanted.sha256
        except OSError:
            return True

    def source(self, name: str) -> Path:
        """Its path."""
        return self.folder / name

    @contextlib.contextmanager
    def receive(self, name: str) -> Iterator[Write]:
        """Context manager that accepts the contents; the file is replaced on exit without an error."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(target) as partial, open(partial, "wb") as file:
            yield file.write
            file.flush()


class Pieces:
    """Parts of files, by their number: each host has those that its own ranks have written."""

    def __init__(self, shared: Sequence[Piece], here: Sequence[int]) -> None:
        self.pieces, self.here = shared, set(here)

    def lacks(self, name: str, wanted: Content) -> bool:
        """Whether another host's rank has written it, and this host's file differs there."""
        piece = self.pieces[int(name)]
        return piece.rank not in self.here and content_of(pieces.read(piece)) != wanted

    def source(self, name: str) -> bytes:
        """Its bytes."""
        return pieces.read(self.pieces[int(name)])

    @contextlib.contextmanager
    def receive(self, name: str) -> Iterator[Write]:
        """Context manager that collects the bytes; they are written and synced on exit without an error."""
        data = bytearray()
        yield data.extend
        pieces.write(self.pieces[int(name)], data)


def content_of(data: bytes) -> Content:
    """Describe bytes."""
    return Content(len(data), hashlib.sha256(data).hexdigest())


def share_pieces(shared: Sequence[Piece], depot: Depot) -> None:
    """Give every host the parts of files that each rank has written (collective).

    Args:
        shared: the same on all ranks.
        depot: where they are left.

    Raises:
        UserError: on every rank: the store fails, or a disk is full.
    """
    if not shared:
        return
    rank = collectives.rank()
    told = exchange.every_rank(
        lambda: {
            str(number): content_of(pieces.read(piece))
            for number, piece in enumerate(shared)
            if piece.rank == rank
        }
    )
    wanted = {name: content for one in told for name, content in one.items()}
    side = Pieces(shared, members.on_host_of(rank))
    distribute(wanted, side, depot, str(shared[0].path.parent))


def distribute(wanted: Mapping[str, Content], side: Side, depot: Depot, where: str) -> None:
    """Give every host what it lacks (collective).

    Args:
        wanted: the same on all ranks.
        side: what this host has.
        depot: where hosts leave objects for each other.
        where: what is exchanged, for errors.

    Raises:
        NowhereFound: on every rank: no host has something that another one lacks.
        UserError: on every rank: the store fails, or a disk is full.
    """
    rank = collectives.rank()
    acts = members.speaks_for_host(rank)

    def look() -> list[str]:
        return [n for n, content in wanted.items() if side.lacks(n, content)] if acts else []

    lacking = [set(names) for names in exchange.every_rank(look)]
    missing = sorted(set().union(*lacking))
    if not missing:
        return
    needs = {name: wanted[name] for name in missing}
    if rank == 0:
        size = sum(content.size for content in needs.values())
        _log.debug(
            "hosts exchange %d files or pieces (%.1f MB) of %s", len(needs), size / 1e6, where
        )
    kept: dict[str, str] = collectives.alone(lambda: depot.kept(needs))
    failed = exchange.every_rank(
        lambda: _fetch_kept(lacking[rank] & kept.keys(), kept, wanted, side, depot)
    )
    left = sorted((set(missing) - kept.keys()).union(*failed))
    lacking = [
        (names - kept.keys()) | set(again) for names, again in zip(lacking, failed, strict=True)
    ]
    holders = _holders(left, lacking, where)
    mine = [name for name in left if holders[name] == rank]
    told = exchange.every_rank(lambda: _leave(mine, wanted, side, depot))
    there = {name: one for part in told for name, one in part.items()}
    exchange.every_rank(lambda: _fetch(sorted(lacking[rank]), there, wanted, side, depot))
    exchange.every_rank(lambda: _remove(sorted({there[name] for name in mine}), depot))


def _holders(names: Sequence[str], lacking: Sequence[set[str]], where: str) -> dict[str, int]:
    """For each name the first acting rank whose host has it."""
    acting = [rank for rank in range(len(lacking)) if members.speaks_for_host(rank)]
    found = {}
    for name in names:
        having = [rank for rank in acting if name not in lacking[rank]]
        if not having:
            raise _shared(NowhereFound(
                f"no host has {name} as it was written, and the run's storage does not have it",
                where=where,
                remedy="the same command continues from what is complete",
            ))  # fmt: skip
        found[name] = having[0]
    return found


def _shared(error: UserError) -> UserError:
    """An error that all ranks raise by themselves."""
    error.shared = True
    return error


def _leave(
    names: Sequence[str], wanted: Mapping[str, Content], side: Side, depot: Depot
) -> dict[str, str]:
    """Leave things in the store; return the objects' names."""
    objects: dict[str, str] = {}

    def one(name: str) -> None:
        with _reported(name):
            objects[name] = depot.leave(wanted[name], side.source(name))

    in_threads.each(one, names)
    return objects


def _fetch(
    names: Sequence[str],
    objects: Mapping[str, str],
    wanted: Mapping[str, Content],
    side: Side,
    depot: Depot,
) -> None:
    in_threads.each(lambda name: _fetch_one(name, objects[name], wanted[name], side, depot), names)


def _fetch_kept(
    names: set[str],
    objects: Mapping[str, str],
    wanted: Mapping[str, Content],
    side: Side,
    depot: Depot,
) -> list[str]:
    """Fetch what the store keeps; return what could not be fetched: a host may still have it."""
    failed: list[str] = []

    def one(name: str) -> None:
        try:
            _fetch_one(name, objects[name], wanted[name], side, depot)
        except Unfit:
            failed.append(name)

    in_threads.each(one, sorted(names))
    return failed


def _fetch_one(name: str, found: str, wanted: Content, side: Side, depot: Depot) -> None:
    digest, size = hashlib.sha256(), 0
    with _reported(name), side.receive(name) as write:

        def take(data: bytes) -> None:
            nonlocal size
            digest.update(data)
            size += len(data)
            write(data)

        depot.fetch(found, wanted.size, take)
        if (size, digest.hexdigest()) != wanted:
            raise Unfit(
                "an object that another host has left in the run's storage does not have the contents "
                "that were written",
                where=found,
                remedy="check the store; the same command continues from what is complete",
            )


@contextlib.contextmanager
def _reported(name: str) -> Iterator[None]:
    """An error of this host's disk is one that all ranks can report, or the others would lose this rank."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"a file of the run can't be read or written: {error.strerror or error}",
            where=str(error.filename or name),
            remedy="fix the run's folder on that host; the same command continues from what is complete",
        ) from None


def _remove(objects: Sequence[str], depot: Depot) -> None:
    # What stays is removed at the next start.
    with contextlib.suppress(UserError):
        in_threads.each(depot.remove, objects)
