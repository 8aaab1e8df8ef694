"""The same command after a SIGKILL continues, and ends where an micro_run run ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
from runs import MICRO, environment, finish, ray_environment, scores, start, torchrun

pytestmark = pytest.mark.slow


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Output up to the first line that matches."""
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return "".join(seen)
    raise AssertionError(f"{pattern!r} never came:\n{''.join(seen)[-4000:]}")


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a process and everything below it, without warning."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        os.kill(member.pid, signal.SIGKILL)
    process.communicate()
    psutil.wait_procs([m for m in family if isinstance(m, psutil.Process)])


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_killed_launch_continues_from_its_checkpoint(stage, micro_run, tmp_path):
    run = tmp_path / "run"
    process = start(torchrun(run), environment())
    read_until(process, rf"{stage} +step 9 ")
    kill_all(process)
    assert not (run / stage / "done.json").exists()
    assert list((run / stage / "checkpoints").glob("step-*"))

    code, output = finish(start(torchrun(run), environment()))
    assert code == 0, output[-4000:]
    assert re.search(rf"{stage} +continues at epoch", output)
    assert "pack     whole, skipped" in output
    assert scores(run) == scores(micro_run)


def test_a_rank_lost_under_ray_is_replaced(micro_run, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cnn2gnn_dist", "run", "--config", "demo", *MICRO]
    process = start([*command, f"run.dir={run}"], ray_environment())
    seen = read_until(process, r"student +step 9 ")
    found = re.findall(r"\(rank 0 pid=(\d+)\)", seen)
    os.kill(int(found[-1]), signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output[-4000:]
    assert "a rank was lost" in output
    assert re.search(r"student +continues at epoch", output)
    assert scores(run) == scores(micro_run)


def test_targets_continue_at_the_first_missing_shard(micro_run, tmp_path):
    """A cut-off run left some files: they are not written again, a damaged one is."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    files = sorted((run / "targets").glob("*.parquet"))
    (run / "targets" / "done.json").unlink()
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-100])
    before = {path.name: path.stat().st_mtime_ns for path in files if path.exists()}
    wanted = {
        path.name: path.read_bytes() for path in sorted((micro_run / "targets").glob("*.parquet"))
    }

    command = torchrun(run)
    code, output = finish(start([*command, "--stages", "targets"], environment()))
    assert code == 0, output[-4000:]
    assert f"{len(files) - 2} of {len(files)} shards are whole" in output
    for path in files:
        assert path.read_bytes() == wanted[path.name]
        rewritten = path in (files[1], files[2])
        assert (path.stat().st_mtime_ns != before.get(path.name)) == rewritten
