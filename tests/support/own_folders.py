"""Hosts that share no folder, on one machine and without root: ranks that call themselves hosts.

Each host's ranks work in a folder of the host's own, which all of them call ``RUN``: a path that every process
sees below its working directory. They believe to be on different hosts, so that nothing is taken for shared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnn2gnn_dist import launcher
from cnn2gnn_dist.runtime.group import members
from cnn2gnn_dist.runtime.shared_files import shared_folder
from tests.support import runs
from tests.support.forks import Fork
from tests.support.ports import free_port

RUN = Path("/proc/self/cwd/run")


def start(
    folders: Sequence[Path], *overrides: str, names: Sequence[str] | None = None
) -> list[Fork]:
    """Start a small run with one rank for each of these folders, in their order.

    Args:
        folders: the folder of each rank's host, created if missing.
        overrides: of the config.
        names: the hosts of the ranks; None: the folders' names.
    """
    arguments = ["--config", "demo", *runs.MICRO, f"run.dir={RUN}", *overrides]
    hosts = [folder.name for folder in folders] if names is None else list(names)
    port = str(free_port())
    ranks = []
    for rank, (folder, host) in enumerate(zip(folders, hosts, strict=True)):
        folder.mkdir(exist_ok=True)
        environment = runs.environment(
            RANK=str(rank),
            LOCAL_RANK=str(hosts[:rank].count(host)),
            WORLD_SIZE=str(len(hosts)),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        ranks.append(Fork(rank_main, (arguments, host), environment, folder))
    return ranks


def rank_main(arguments: list[str], host: str) -> int:
    """The program, in a process that believes to be on this host."""
    real = members.Member.here

    def here(*given: Any, **more: Any) -> members.Member:
        return replace(real(*given, **more), host=host, place=host)

    members.Member.here = here  # type: ignore[method-assign]
    shared_folder.SECONDS = 2.0  # a name on this machine's disk is seen at once
    sys.argv = ["launch/train.py", *arguments]
    launcher.exit_now(launcher.main())


def believe(names: Sequence[str]) -> None:
    """Let the ranks of a group that exists believe to be on these hosts, by rank."""
    members._present = tuple(
        replace(member, host=name, place=name)
        for member, name in zip(members.present(), names, strict=True)
    )
