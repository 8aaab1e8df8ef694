"""Ranks of a benchmark: processes on this machine that form a group, with one thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from free_ports import free_port

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(
    program: str, arguments: Sequence[str], ranks: int, folder: str | Path | None = None
) -> list[dict[str, Any]] | None:
    """Run a program on a number of ranks until all have ended; return each rank's last line.

    They find each other by the variables that torchrun sets (RANK, WORLD_SIZE, MASTER_ADDR, …), and import this
    checkout.

    Args:
        program: path of a script whose last line of output is a JSON object.
        arguments: for every rank.
        ranks: how many.
        folder: the working directory; None: that of this process.

    Returns:
        The objects; None if a rank failed (its error is on stderr).
    """
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    group |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, program, *arguments],
            env={"PYTHONWARNINGS": "ignore"} | os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        return None
    return [json.loads(text.splitlines()[-1]) for text in said]
