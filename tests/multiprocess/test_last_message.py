"""Rank 0 reports an error of all ranks even if another one ends first and the launcher stops those that are left."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from tests.support import REPOSITORY, late_rank, runs
from tests.support.forks import Fork
from tests.support.watching import ranks_of, reach


def launched(run: Path, *overrides: str) -> Fork:
    """A run on two ranks; rank 0 is late (``late_rank``)."""
    arguments = ["--config", "demo", *runs.MICRO, f"run.dir={run}", *overrides]
    return Fork(runs.launch_ranks, (2, late_rank.main, arguments), runs.environment(), REPOSITORY)


def test_of_a_config_that_all_refuse(tmp_path: Path) -> None:
    code, output = runs.finish(launched(tmp_path / "run", "student.epoch=1"))
    assert code == 1, output
    assert "exitcode  : 2" in output
    assert "did you mean student.epochs?" in output


def test_of_a_request_to_stop(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launched(run, "teacher.epochs=2000", "checkpoint.every_steps=1000")
    reach(process, run, "teacher", 2)
    ranks_of(process)[1].send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == 1, output
    assert "exitcode  : 143" in output
    step = re.search(r"teacher was asked to stop: step (\d+) is saved", output)
    assert step, output
    assert (run / "teacher/checkpoints/latest").read_text() == f"step-{int(step[1]):08d}"


def test_of_a_folder_that_is_not_a_runs(tmp_path: Path) -> None:
    """Which rank 0 alone has looked at, for all."""
    (tmp_path / "thesis.tex").write_text("mine")
    code, output = runs.finish(launched(tmp_path))
    assert code == 1, output
    assert "exitcode  : 2" in output
    assert "is not a run folder" in output
