"""Checks of this machine before Ray starts on it: a problem is reported at once, not by a hang."""

from __future__ import annotations

import functools
import os
import resource
import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime import bounded_wait
from cnn2gnn_dist.runtime.hosts import allotted

T = TypeVar("T")

ANSWER_S = 12.0
"""Seconds within which this host's file systems must answer before a run begins; a lost file server never does."""
LEAST_FILES = 256
"""Open files; with fewer, Ray's daemons wait for each other forever."""
RANK_BYTES = 300 << 20
"""Memory that a rank uses before it has trained anything: torch, DeepSpeed, Ray."""
RAY_BYTES = 600 << 20
"""Memory of Ray's daemons and of the driver."""
RANKS_PER_CORE = 8
"""With more, ranks start so slowly that the others give up on them."""
SHARED_MEMORY = Path("/dev/shm")
LEAST_ROOM = 64 << 20
"""Bytes that a folder for temporary files or a cache must have free."""
LEAST_SHARED = 32 << 20
"""Least bytes that NCCL or a DGL server needs in /dev/shm."""


def check(ranks: int) -> None:
    """Check that a Ray with ``ranks`` ranks can run here.

    Raises:
        UserError: loopback is down; /dev/shm can't be written; too few open files, cores, or
            too little memory.
    """
    check_loopback()
    check_files()
    check_shared_memory()
    check_cores(ranks, allotted.cores())
    check_memory(ranks, allotted.available_memory())


def check_rank(cache: Path | None, shares_memory: bool) -> None:
    """Check that this host has room for a rank, before it trains.

    Args:
        cache: folder of cached shards, if the run caches any.
        shares_memory: processes of the rank use /dev/shm: NCCL's, or DGL's.

    Raises:
        UserError: a folder can't be written, or has too little room.
    """
    check_room(Path(tempfile.gettempdir()), LEAST_ROOM, "TMPDIR=a folder with more room")
    if cache is not None:
        check_room(cache, LEAST_ROOM, "free some, or stream.cache_dir=another folder")
    if shares_memory:
        check_room(SHARED_MEMORY, LEAST_SHARED, "a larger /dev/shm (docker: --shm-size=4g)")


def in_time(work: Callable[[], T], where: str) -> T:
    """The result of ``work``, which accesses files, if it is done within ``ANSWER_S``.

    Raises:
        UserError: it isn't: a call into a file system that doesn't answer can't be interrupted.
    """
    try:
        return bounded_wait.result(work, ANSWER_S, "a look at files")
    except TimeoutError:
        raise UserError(
            f"this file system has not answered for {ANSWER_S:g} s",
            where=where,
            remedy="its server, or the network to it, is down: `ls` there should answer at once; mount it again",
        ) from None


def check_answers(paths: Iterable[Path]) -> None:
    """Check that the file systems of these paths answer, even if only with an error.

    Raises:
        UserError: one does not, within ``ANSWER_S``.
    """
    for path in paths:
        in_time(functools.partial(os.path.exists, path), str(path))


def check_room(folder: Path, least: int, remedy: str) -> None:
    """Check that a folder, or the nearest one above it that exists, has ``least`` bytes free.

    Raises:
        UserError: it has less, or can't be written or accessed.
    """
    try:
        there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
        room = os.statvfs(there)
    except OSError as error:  # no permission on the way to it, or a mount that has gone stale
        raise UserError(
            f"this folder can't be accessed: {error.strerror}", where=str(folder), remedy=remedy
        ) from None
    free = room.f_bavail * room.f_frsize
    if free < least or not os.access(there, os.W_OK):
        what = f"has {free / 2**20:.0f} MiB free, {least / 2**20:.0f} are needed"
        raise UserError(
            f"this folder {what if free < least else 'is not writable'}",
            where=str(folder),
            remedy=remedy,
        )


def check_loopback() -> None:
    """Check that this host reaches itself, as a Ray on loopback must.

    Raises:
        UserError: it does not.
    """
    try:
        with socket.socket() as listening, socket.socket() as client:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1)
            client.settimeout(2)
            client.connect(listening.getsockname())
    except OSError as error:
        raise UserError(
            f"this host can't connect to itself at 127.0.0.1: {error.strerror or error}",
            where="the network interface lo",
            remedy="`ip link set lo up` (root), or a container with its own network",
        ) from None


def check_files() -> None:
    """Check that Ray's daemons may open as many files as they need.

    Raises:
        UserError: they may not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, hard)  # Ray raises the soft limit itself
    if resource.RLIM_INFINITY not in (soft, hard) and most < LEAST_FILES:
        raise UserError(
            f"a process may open only {most} files here, but Ray needs {LEAST_FILES}",
            where="ulimit -n",
            remedy="a higher limit: `ulimit -n 65536`, in a container --ulimit nofile=65536",
        )


def check_shared_memory() -> None:
    """Check that Ray's object store can use shared memory, or the disk where there is none.

    Raises:
        UserError: nothing can be written there.
    """
    if SHARED_MEMORY.is_dir():
        try:
            with tempfile.TemporaryFile(dir=SHARED_MEMORY) as file:
                os.posix_fallocate(file.fileno(), 0, 1 << 20)
        except OSError as error:
            raise UserError(
                f"nothing can be written to {SHARED_MEMORY}: {error.strerror}",
                where=str(SHARED_MEMORY),
                remedy="a writable /dev/shm of 1 GiB or more (docker: --shm-size=4g)",
            ) from None


def check_cores(ranks: int, cores: int) -> None:
    """Check that there are not many times more ranks than cores.

    Raises:
        UserError: there are.
    """
    if ranks > RANKS_PER_CORE * cores:
        raise UserError(
            f"{ranks} ranks on {cores} cores would spend their time waiting for each other",
            where="run.ranks",
            remedy=f"run.ranks={cores}: one per core (or GPU), or a larger cluster in "
            "cluster.address",
        )


def check_memory(ranks: int, available: int) -> None:
    """Check that ranks and Ray fit into ``available`` bytes.

    Raises:
        UserError: they don't.
    """
    fit = (available - RAY_BYTES) // RANK_BYTES
    if fit < ranks:
        raise UserError(
            f"{ranks} ranks need about {(RAY_BYTES + ranks * RANK_BYTES) / 2**30:.1f} GiB of memory "
            f"before they train anything, but {available / 2**30:.1f} GiB is available",
            where="run.ranks",
            remedy=f"run.ranks={max(fit, 1)}, or a machine with more memory",
        )
