"""Ranks on several hosts of ``tests.support.hosts``, one on each, without a launcher."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cnn2gnn_dist import launcher
from tests.support import rank_group, runs
from tests.support.forks import Fork
from tests.support.hosts import Host, end_family
from tests.support.rank_group import Outcome

PORT = 29_500


def start(
    members: Sequence[Host],
    arguments: Sequence[str],
    port: int = PORT,
    own: dict[int, dict[str, str]] | None = None,
    extra: dict[int, list[str]] | None = None,
    before: Callable[[int], None] | None = None,
    **more: str,
) -> list[Fork]:
    """Start ``launch/train.py`` with these arguments as one rank on each host; rank 0 on the first.

    Args:
        members: the hosts.
        arguments: for the program.
        port: for rank 0's store.
        own: further environment variables by rank.
        extra: further arguments by rank.
        before: called in each rank's process with its number, before the program; sets up what is special there.
        more: further environment variables for all.
    """
    return [
        host.fork(
            rank_main,
            ([*arguments, *(extra or {}).get(rank, [])], before, rank),
            environment(members, rank, port) | more | (own or {}).get(rank, {}),
        )
        for rank, host in enumerate(members)
    ]


def environment(members: Sequence[Host], rank: int, port: int = PORT) -> dict[str, str]:
    """The environment variables of a rank, as a launcher sets them."""
    return runs.environment(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(len(members)),
        MASTER_ADDR=members[0].address,
        MASTER_PORT=str(port),
    )


def finish(ranks: Sequence[Fork], seconds: float = 600) -> list[tuple[int, str]]:
    """Exit code and output of each rank; no rank outlives this call."""
    try:
        return [runs.finish(rank, seconds) for rank in ranks]
    finally:
        for rank in ranks:
            end_family(rank)


def call(
    members: Sequence[Host],
    folder: Path,
    case: Callable[..., Any],
    *arguments: Any,
    seconds: float = 600,
    timeout_s: float = rank_group.GROUP_TIMEOUT_S,
) -> list[Outcome]:
    """The outcomes of ``case(*arguments)`` in a group of one rank on each host (``rank_group.launch``).

    ``folder``: a new folder that all hosts see, for arguments and results.
    """
    folder.mkdir()
    job = (case.__module__, case.__name__, arguments, timeout_s)
    (folder / "job").write_bytes(pickle.dumps(job))
    ranks = [
        host.fork(
            rank_group.main, (folder,), environment(members, rank), output=folder / f"{rank}.out"
        )
        for rank, host in enumerate(members)
    ]
    try:
        for rank in ranks:
            rank.wait(seconds)
    finally:
        for rank in ranks:
            end_family(rank)
    return [rank_group.outcome(folder, number, rank) for number, rank in enumerate(ranks)]


def micro(run_dir: Path, *overrides: str) -> list[str]:
    """Arguments of a small complete run."""
    return ["--config", "demo", *runs.MICRO, f"run.dir={run_dir}", *overrides]


def rank_main(
    arguments: list[str], before: Callable[[int], None] | None = None, rank: int = 0
) -> int:
    """The program in a rank's own process; ``before`` and ``rank`` as in ``start``."""
    if before is not None:
        before(rank)
    sys.argv = ["launch/train.py", *arguments]
    launcher.exit_now(launcher.main())
