"""After a kill the same command continues, and its result is bit-identical to that of an uninterrupted run."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest

from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support.runs import (
    MICRO,
    copy_before,
    environment,
    finish,
    launch,
    lines,
    ray_environment,
    start,
    torchrun,
    trail,
)
from tests.support.watching import frozen, kill_all, ranks_of, reach, read_until

LOST_S = 20
"""Seconds without an answer after which a rank counts as lost: more than a rank takes on a loaded machine."""
TO_STUDENT = "pack,index,teacher,targets,student"


def test_a_launch_killed_in_every_training_continues_from_its_checkpoints(tmp_path):
    """Every loss and weight is bit-identical, for the same ZeRO stage, since each stage sums in its own order."""

    def command(run: Path) -> list[str]:
        zero = ("teacher.zero_stage=3", "student.zero_stage=1")
        return [*launch(run, *zero), "--stages", f"{TO_STUDENT},control"]

    whole, run = tmp_path / "whole", tmp_path / "run"
    code, output = finish(start(command(whole), environment()))
    assert code == 0, output[-4000:]
    killed = None
    for stage in ("teacher", "student", "control"):
        process = start(command(run), environment())
        reach(process, run, stage)
        output = kill_all(process)
        assert killed is None or re.search(rf"{killed} +resumes at epoch", output)
        assert not (run / stage / "done.json").exists()
        assert list((run / stage / "checkpoints").glob("step-*"))
        killed = stage

    code, output = finish(start(command(run), environment()))
    assert code == 0, output[-4000:]
    assert re.search(r"control +resumes at epoch", output)
    assert "pack     complete, skipped" in output
    assert trail(run) == trail(whole)


@pytest.mark.parametrize(("stage", "ranks"), [("teacher", 1), ("student", 1), ("student", 2)])
def test_a_run_goes_on_at_another_world_size(stage, ranks, micro_run, tmp_path):
    """Same batches, same neighbors, the same losses up to rounding; nothing is converted.

    Moments over several ranks and moments of one rank are rounded differently, and training amplifies
    that from step to step (Adam makes a full step of a gradient that is only rounding error).
    """
    how = ["student.max_micro_batch=32", "teacher.max_micro_batch=16"]
    before = {"teacher": "pack,index,teacher", "student": TO_STUDENT}[stage]

    def command(run: Path, ranks: int) -> list[str]:
        return [*launch(run, *how, ranks=ranks), "--stages", before]

    whole, run = micro_run, tmp_path / "run"  # its two ranks have these micro-batches
    if ranks == 2:
        whole = tmp_path / "whole"
        copy_before(micro_run, whole, stage)
        code, output = finish(start(command(whole, 1), environment()))
        assert code == 0, output[-4000:]
    copy_before(micro_run, run, stage)
    process = start(command(run, 3 - ranks), environment())
    reach(process, run, stage)
    kill_all(process)
    code, output = finish(start(command(run, ranks), environment()))
    assert code == 0, output[-4000:]
    assert re.search(rf"{stage} +resumes at epoch", output)

    expected, found = lines(whole / stage), lines(run / stage)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "test_accuracy"):
            if name in theirs:
                tolerance = 1e-4 if ours["step"] <= 8 else 1e-2
                assert ours[name] == pytest.approx(theirs[name], rel=tolerance), theirs


def test_one_rank_killed_in_batch_scope(micro_run, tmp_path):
    """The paper's scope: torchrun ends the other rank, and the next launch resumes."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    how = ["graph.scope=batch", "student.epochs=2", "student.zero_stage=0"]
    for folder in (whole, run):
        copy_before(micro_run, folder, "student")
    stages = ["--stages", TO_STUDENT]
    code, output = finish(start([*launch(whole, *how), *stages], environment()))
    assert code == 0, output[-4000:]
    process = start([*torchrun(run, *how), *stages], environment())
    reach(process, run, "student")
    ranks_of(process)[1].kill()
    code, output = finish(process)
    assert code != 0, output
    code, output = finish(start([*launch(run, *how), *stages], environment()))
    assert code == 0, output[-4000:]
    assert re.search(r"student +resumes at epoch", output)
    assert trail(run, ("student",)) == trail(whole, ("student",))


def test_a_notice_to_end_saves_the_step(micro_run, tmp_path):
    """Both ranks save at the same next step, report it, and exit with code 143: in a teacher's epoch,
    and in a student's.
    """
    run, step = tmp_path / "run", ""
    command = [*launch(run, "checkpoint.every_steps=1000"), "--stages", f"{TO_STUDENT},control"]
    for number, place in ((signal.SIGTERM, "teacher"), (signal.SIGUSR1, "student")):
        process = start(command, environment())
        reach(process, run, place, 2)
        ranks_of(process)[1].send_signal(number)  # a signal to one rank stops all ranks
        code, output = finish(process)
        assert code != 0, output
        assert "exitcode  : 143" in output, output
        assert not step or f"(step {step})" in output
        stage, step = re.search(r"(\w+) was asked to stop: step (\d+) is saved", output).groups()
        assert (run / stage / "checkpoints" / "latest").read_text() == f"step-{int(step):08d}"

    code, output = finish(start(command, environment()))
    assert code == 0, output[-4000:]
    assert f"(step {step})" in output
    assert trail(run) == trail(micro_run)


def test_a_silent_peer_ends_in_a_named_error(tmp_path):
    """One rank is stopped: the other reports it after cluster.timeout_s and exits with code 75."""
    run = tmp_path / "run"
    process = start(launch(run, f"cluster.timeout_s={LOST_S}"), environment())
    reach(process, run, "teacher", 2)
    ranks = ranks_of(process)
    ranks[1].suspend()
    try:
        seen = read_until(process, f"another rank died, or did not answer within {LOST_S} s")
        ranks[0].wait(60)
    finally:
        ranks[1].kill()
    code, output = finish(process)
    assert code != 0
    assert "exitcode  : 75" in output, seen + output


@pytest.mark.ray
@pytest.mark.timeout(2400)  # it starts Ray five times
def test_a_run_under_ray_outlives_a_notice_rays_head_the_driver_a_reader_and_a_rank(
    micro_run, tmp_path
):
    """On a notice the step is saved. A lost reader or rank is replaced during the run; after the other kills
    the same command resumes. The result shows no trace of any of it.
    """
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cnn2gnn_dist", "run", "--config", "demo", *MICRO]
    command += [f"run.dir={run}"]
    how = ["checkpoint.every_steps=1000", "cluster.grace_s=120"]
    process = start([*command, *how], ray_environment())
    # Ray looks at signals once a second: a fast machine would train to the end in that time.
    reach(process, run, "teacher", 2)
    ranks = frozen(process, "ray::_Rank")
    process.terminate()
    read_until(process, "asked to stop: the ranks save their step")
    for rank in ranks:
        rank.resume()
    code, output = finish(process)
    assert code == 143, output
    stage, step = re.search(r"(\w+) was asked to stop: step (\d+) is saved", output).groups()
    assert (run / stage / "checkpoints" / "latest").read_text() == f"step-{int(step):08d}"

    process = start(command, ray_environment())
    # On a busy machine the notice may arrive at the teacher's end.
    ended = stage == "teacher" and int(step) + 2 > lines(micro_run / "teacher")[-1]["step"]
    reach(process, run, *(("student", None) if ended else (stage, int(step) + 2)))
    family = family_of(process)
    frozen(process, "ray::_Rank")
    kill_one(family, "gcs_server")
    code, output = finish(process)
    assert_all_ended(code, output, family)

    earlier = lines(run / "student") if (run / "student" / "metrics.jsonl").exists() else []
    process = start(command, ray_environment())
    reach(process, run, "student", earlier[-1]["step"] + 1 if earlier else 1)
    reach(process, run, "student")
    family = family_of(process)
    frozen(process, "ray::_Rank")
    process.kill()  # the driver
    code, output = finish(process)
    assert_all_ended(code, output, family)

    last = lines(run / "student")[-1]["step"]
    process = start(command, ray_environment())
    reach(process, run, "student", last + 2)
    kill_one(family_of(process), "ray::ReaderAct")
    reach(process, run, "student", last + 6)
    kill_one(family_of(process), "ray::_Rank")
    code, output = finish(process)
    assert code == 0, output[-4000:]
    assert "a rank was lost" in output
    assert len(re.findall(r"student +resumes at epoch", output)) == 2
    assert trail(run) == trail(micro_run)


def family_of(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def kill_one(family: list[psutil.Process], name: str) -> None:
    """Send SIGKILL to the first process of this name."""
    next(child for child in family if child.name().startswith(name)).kill()


def assert_all_ended(code: int, output: str, family: list[psutil.Process]) -> None:
    assert code != 0, output[-4000:]
    psutil.wait_procs(family, timeout=60)
    assert [child for child in family if child.is_running()] == []


def test_targets_continue_at_the_first_missing_shard(micro_run, tmp_path):
    """Files that an interrupted run left are not written again, except for a corrupt one."""
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

    command = launch(run)
    code, output = finish(start([*command, "--stages", "targets"], environment()))
    assert code == 0, output[-4000:]
    assert f"{len(files) - 2} of {len(files)} shards are complete" in output
    for path in files:
        assert path.read_bytes() == wanted[path.name]
        rewritten = path in (files[1], files[2])
        assert (path.stat().st_mtime_ns != before.get(path.name)) == rewritten


def test_a_notice_without_a_step_that_ends_in_time_is_reported(tmp_path):
    """The peer is stopped, so the step never ends: the rank reports what is lost and exits with code 143."""
    run = tmp_path / "run"
    process = start(launch(run, "checkpoint.grace_s=3"), environment())
    reach(process, run, "teacher", 2)
    ranks = ranks_of(process)
    ranks[1].suspend()
    try:
        ranks[0].send_signal(signal.SIGTERM)
        seen = read_until(process, "no step finished within 3 s of the request to stop")
        ranks[0].wait(60)
    finally:
        ranks[1].kill()
    code, output = finish(process)
    assert code != 0
    assert "the last checkpoint is" in seen
    assert "exitcode  : 143" in output, seen + output


def test_force_goes_on_under_another_config(micro_run, tmp_path):
    """Without --force the change is named and refused; with it the teacher resumes and the rest is recomputed."""
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    command = [*launch(run, "teacher.epochs=3"), "--stages", "pack,index,teacher"]
    code, output = finish(start(command, environment()))
    assert code != 0
    assert "teacher.epochs: 2 -> 3" in output
    assert "--force" in output
    command = [*launch(run, "teacher.epochs=3"), "--stages", "pack,index,teacher", "--force"]
    code, output = finish(start(command, environment()))
    assert code == 0, output[-4000:]
    assert "resuming anyway" in output
    assert "(step 18)" in output
    assert [line["step"] for line in lines(run / "teacher") if "loss" in line] == list(range(1, 28))
    assert lines(run / "teacher")[:18] == lines(micro_run / "teacher")[:18]


def test_force_begins_the_epoch_again_when_the_order_is_another(micro_run, tmp_path):
    """With another number of partitions in the middle of an epoch, no sample of that epoch is left out."""
    run = tmp_path / "run"
    copy_before(micro_run, run, "student")
    before = ["--stages", TO_STUDENT]
    process = start([*launch(run), *before], environment())
    reach(process, run, "student", 14)
    kill_all(process)
    newest = disk.all_of(run / "student" / "checkpoints")[-1]
    cursor = disk.read_state(newest)["extra"]["cursor"]
    command = [*launch(run, "graph.partition.parts=4"), *before, "--force"]
    code, output = finish(start(command, environment()))
    assert code == 0, output[-4000:]
    assert "resuming anyway: made from a different config" in output
    assert "graph.partition.parts: 2 -> 4" in output
    assert f"student  resumes at epoch {cursor['epoch']}, batch {cursor['batch']}" in output
    assert ("the order of samples has changed" in output) == (cursor["batch"] > 0)
    last = lines(run / "student")[-1]
    assert last["step"] == 27 + cursor["batch"]
    assert last["epoch"] == 3
