"""Rows of arrays on disk: across processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from cnn2gnn_dist.graph.search.work_units import RankGroup, row_ranges
from tests.support import REPOSITORY
from tests.unit.graph.test_row_file import filled, numbers, right

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.graph import test_row_file as t
from cnn2gnn_dist.graph.search import work_units as units
def die(path, text):
    if "00002" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, text)
real, units.durable.write_text = units.durable.write_text, die
t.filled(Path(sys.argv[1]), t.RankGroup())
"""


def test_a_kill_between_rows_and_mark_costs_the_unit(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert [p.name for p in sorted(tmp_path.glob("*.done"))] == [
        "made-00000.done",
        "made-00001.done",
    ]
    again: list[slice] = []

    def work(unit: slice) -> tuple[np.ndarray, np.ndarray]:
        again.append(unit)
        return numbers(unit)

    assert right(filled(tmp_path, RankGroup(), work))
    assert again == row_ranges(23, 5)[2:]
