"""Files that one host writes and others read: the readers see what was written, or all ranks stop.

A client of a file server caches names (absent ones too), sizes and pages of files for a while. A rank
that reads a file during that time may read zeros, an earlier version or nothing, and continue with it.
So files that cross from host to host are handed over: one rank lists them with their sizes and
checksums; one rank on each host polls until it sees them like that, or time is up. Where all ranks
share a page cache, nothing is done. Where each host has a folder of its own, hosts fetch what they lack from
the run's storage (``exchange_by_store``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives, exchange, members
from cnn2gnn_dist.runtime.shared_files import exchange_by_store, host_folders
from cnn2gnn_dist.runtime.shared_files.exchange_by_store import Content
from cnn2gnn_dist.runtime.shared_files.pieces import Piece

WAIT_S = 75.0
"""Clients of NFS cache names for up to 60 s (acdirmax)."""
POLL_S, AGAIN_S = 0.1, 1.0


class Written(NamedTuple):
    """A file as it was written; ``sha256`` None: only its size is compared."""

    size: int
    sha256: str | None = None


Files = Mapping[str, Written]
"""By path relative to a folder."""


def described(folder: Path, names: Mapping[str, bool]) -> dict[str, Written]:
    """Describe files of a folder as this rank reads them, with checksums where the value is true."""
    return {
        name: Written(
            (folder / name).stat().st_size, durable.sha256(folder / name) if sums else None
        )
        for name, sums in names.items()
    }


def recorded(folder: Path, sums: Mapping[str, str]) -> dict[str, Written]:
    """Describe files whose checksums were recorded when they were written."""
    return {name: Written((folder / name).stat().st_size, sha) for name, sha in sums.items()}


def hand_over(folder: Path, files: Callable[[], Files], own_sums: bool = True) -> None:
    """Wait until every host sees these files of a folder as rank 0 describes them (collective).

    Hosts with folders of their own fetch those that they lack, or have otherwise.

    Args:
        folder: the same path on all hosts.
        files: called on rank 0 only, and only if there are several hosts.
        own_sums: the checksums were computed on rank 0's host, which needs no second look.

    Raises:
        NowhereFound: on every rank: no host has one of them, nor has the run's storage.
        UserError: on every rank: a host sees something else, even after ``WAIT_S``; the storage fails.
    """
    if not members.on_several_hosts():
        return
    if host_folders.are_separate():
        contents = collectives.alone(lambda: _with_sums(folder, files()))
        side = exchange_by_store.Files(folder)
        exchange_by_store.distribute(contents, side, host_folders.depot(), str(folder))
        return
    wanted: Files = collectives.alone(files)
    rank = collectives.rank()

    def look() -> None:
        if members.speaks_for_host(rank):
            wait_for(folder, wanted, sums=not (own_sums and rank == 0))

    exchange.every_rank(look)


def _with_sums(folder: Path, files: Files) -> dict[str, Content]:
    return {
        name: Content(size, durable.sha256(folder / name) if sha is None else sha)
        for name, (size, sha) in files.items()
    }


def wait_for(folder: Path, files: Files, sums: bool = True, seconds: float | None = None) -> None:
    """Wait until this host sees these files.

    Raises:
        UserError: it sees something else, even after ``seconds`` (``WAIT_S``).
    """
    deadline = time.monotonic() + (WAIT_S if seconds is None else seconds)
    for name, wanted in files.items():
        while (why := _difference(folder / name, wanted, sums)) is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"files that another host has written are not seen here as they were written: "
                    f"{name} {why}",
                    where=str(folder),
                    remedy="use a run.dir where every host sees what another has written; the same "
                    "command resumes",
                )
            time.sleep(AGAIN_S if sums and wanted.sha256 else POLL_S)


def forget(paths: Iterable[Path]) -> None:
    """Before files are read that several hosts have written: ask the file server for all pages."""
    if members.on_several_hosts():
        for path in paths:
            durable.forget_pages(path)


def share(pieces: Sequence[Piece]) -> None:
    """After ranks have filled parts of the same files: give them to hosts with folders of their own (collective).

    Args:
        pieces: the same on all ranks.

    Raises:
        UserError: on every rank: the storage fails, or a disk is full.
    """
    if members.on_several_hosts() and host_folders.are_separate():
        exchange_by_store.share_pieces(pieces, host_folders.depot())


def wait_for_folder(folder: Path) -> None:
    """Wait until this rank can write into a folder that rank 0 has created (not collective).

    A folder of the same name that rank 0 has removed before may still be cached. A host with a folder of its
    own has created it itself.

    Raises:
        OSError: it can't, even after ``WAIT_S``.
    """
    if not members.on_several_hosts() or host_folders.are_separate() or collectives.rank() == 0:
        return
    probe, deadline = folder / f".{collectives.rank()}.probe", time.monotonic() + WAIT_S
    while True:
        try:
            probe.touch()
            probe.unlink()
            return
        except OSError as error:
            late = time.monotonic() > deadline
            if late or error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
        time.sleep(POLL_S)


def patiently(check: Callable[[], None], seconds: float) -> None:
    """Repeat a check until it passes, at most for ``seconds``.

    Raises:
        UserError: the check's, after that.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check()
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _difference(path: Path, wanted: Written, sums: bool) -> str | None:
    """How this host sees the file; None: as it was written."""
    try:
        handle = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC
        )  # file servers are asked again when a file is opened
    except OSError as error:
        return f"({error.strerror})"
    try:
        size = os.fstat(handle).st_size
        if size != wanted.size:
            return f"has {size:,} bytes instead of {wanted.size:,}"
        if sums and wanted.sha256 is not None and durable.sha256(path) != wanted.sha256:
            with contextlib.suppress(OSError):
                os.posix_fadvise(
                    handle, 0, 0, os.POSIX_FADV_DONTNEED
                )  # the next look asks the server
            return "has other contents"
    finally:
        os.close(handle)
    return None
