"""A run kept in an object store: after a kill and the loss of its folder, the result is bit-identical."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from cnn2gnn_dist import cli
from tests.support.runs import (
    MICRO,
    alone,
    environment,
    finish,
    launch,
    results,
    scores,
    start,
    trail,
)
from tests.support.stored import record_files, s3_bucket
from tests.support.watching import kill_all

COMPLETE = re.compile(r"checkpoints/step-\d+/manifest\.json")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with s3_bucket() as store:
        yield store


def reach_stored(process: Any, fs: Any, url: str, stage: str, checkpoint: str) -> None:
    """Wait until the storage has this checkpoint of a training in progress, or a later one: not every one is copied."""
    deadline = time.monotonic() + 400

    def newest() -> str:
        names = record_files(fs, url, stage)
        return max((name.split("/")[1] for name in names if COMPLETE.fullmatch(name)), default="")

    while newest() < checkpoint:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no {stage} {checkpoint}:\n{process.communicate()[0][-4000:]}")
        time.sleep(0.02)


def steps_in(names: list[str]) -> list[str]:
    return sorted({name.split("/")[1] for name in names if name.startswith("checkpoints/step-")})


def planned(run: Path, *overrides: str) -> tuple[dict[str, str], str]:
    """What a dry run prints: the status of each stage, and its line about the storage; it changes no file."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    command = ["run", "--config", "demo", *MICRO, f"run.dir={run}", *overrides, "--dry-run"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    text = printed.getvalue()
    found = re.findall(r"^(\w+) +(to run|to resume|complete|stale) ", text, re.MULTILINE)
    return dict(found), "".join(re.findall(r"^storage: .*", text, re.MULTILINE))


def test_killed_in_each_training_and_continued_on_empty_folders(bucket, micro_run, tmp_path):
    """Teacher and student are killed and their folder is lost; the third host ends bit-identical to an
    uninterrupted run. A fourth finds everything complete and fetches nothing.
    """
    url = "s3://runs/micro"

    def command(run: Path) -> list[str]:
        return launch(run, f"run.storage={url}")

    process = start(command(tmp_path / "1"), environment())
    reach_stored(process, bucket, url, "teacher", "step-00000008")
    kill_all(process)
    shutil.rmtree(tmp_path / "1")
    process = start(command(tmp_path / "2"), environment())
    reach_stored(process, bucket, url, "student", "step-00000012")
    output = kill_all(process)
    assert "pack     complete, skipped" in output
    assert re.search(r"teacher +resumes at epoch", output)
    stored = f"run.storage={url}"
    planned(tmp_path / "none", stored)  # by then the store has carried out the last request, too
    kept = steps_in(record_files(bucket, url, "student"))
    assert 1 <= len(kept) <= 3  # checkpoint.keep_last, and the best
    (here, line), empty = planned(tmp_path / "2", stored), planned(tmp_path / "none", stored)
    assert [here[name] for name in ("pack", "index", "teacher", "targets")] == ["complete"] * 4
    assert [here[name] for name in ("student", "graph")] == ["to resume", "to run"]
    whole = "complete: pack, index, teacher, targets"
    assert line == f"storage: {url} holds {whole}; student up to {max(kept)}"
    assert empty == (here, line)
    assert not (tmp_path / "none").exists()
    shutil.rmtree(tmp_path / "2")
    assert not (tmp_path / "none").exists()

    code, output = finish(start(command(tmp_path / "3"), environment()))
    assert code == 0, output[-4000:]
    assert re.search(r"student +resumes at epoch", output)
    assert "teacher  complete, skipped" in output
    assert trail(tmp_path / "3") == trail(micro_run)
    assert scores(tmp_path / "3") == scores(micro_run)
    stored = record_files(bucket, url, "run")
    assert stored == ["config.yaml", "report.html", "results.json"]

    code, output = finish(start(command(tmp_path / "4"), environment()))
    assert code == 0, output[-4000:]
    assert output.count("complete, skipped") == 9
    assert "fetching" not in output
    assert results(tmp_path / "4") == results(tmp_path / "3")
    assert not list((tmp_path / "4").rglob("*.safetensors"))
    assert not list((tmp_path / "4").rglob("*.tar"))
    _check_commands(url, tmp_path / "3", tmp_path)
    _check_without(tmp_path / "4", url)


def _check_commands(url: str, run: Path, tmp_path: Path) -> None:
    """Commands that read a run also take its storage."""
    assert cli.main(["checkpoint", "verify", url]) == 0
    assert cli.main(["checkpoint", "ls", f"{url}/student"]) == 0
    for place, name in ((f"{url}/teacher", "far"), (f"{run}/teacher", "near")):
        out = str(tmp_path / f"{name}.safetensors")
        assert cli.main(["checkpoint", "export", place, "--out", out]) == 0
    far, near = (_exported(tmp_path / f"{name}.safetensors") for name in ("far", "near"))
    assert far == near
    for place, name in ((url, "far"), (str(run), "near")):
        assert cli.main(["export", place, "--to", str(tmp_path / name)]) == 0
    files = {
        folder: {
            str(path.relative_to(tmp_path / folder)): path.read_bytes()
            for path in (tmp_path / folder).rglob("*")
            if path.is_file()
        }
        for folder in ("far", "near")
    }
    assert files["far"] == files["near"]


def _exported(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata (whose order in the file is not defined) and tensors of an export."""
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def _check_without(run: Path, url: str) -> None:
    """With a folder that is incomplete without its storage, the run says so instead of training again."""
    code, output = alone(*launch(run, ranks=1)[2:])
    assert code == 2
    dry = ["run", "--config", "demo", *MICRO, f"run.dir={run}", "--dry-run"]
    assert cli.main(dry) == 2
    assert f"parts of this run are only in {url}" in output
    assert f"run.storage={url}" in output


def test_a_damaged_shard_in_the_storage_is_named(bucket, tmp_path):
    url = "s3://runs/damaged"
    first = launch(tmp_path / "1", f"run.storage={url}")[2:]
    code, output = alone(*first, "--stages", "pack,index")
    assert code == 0, output[-4000:]
    [victim] = [n for n in bucket.find("runs/damaged/files/shards") if "train-000002" in n]
    data = bucket.cat_file(victim)
    bucket.pipe_file(victim, data[:-1] + bytes([data[-1] ^ 1]))
    second = launch(tmp_path / "2", f"run.storage={url}")[2:]
    code, output = alone(*second, "--stages", "teacher")
    assert code == 2
    assert "an object of the run's storage does not have the contents that were written" in output
    assert f"s3://{victim}" in output


def test_checkpoints_that_cannot_be_copied_end_a_run(bucket, tmp_path):
    """The bucket is removed during training: each failure is reported, and checkpoint.max_failures ends the run."""
    bucket.mkdir("short-lived")
    url = "s3://short-lived/run"
    how = ("checkpoint.every_steps=1", "checkpoint.max_failures=2", "teacher.epochs=200")
    process = start(launch(tmp_path, f"run.storage={url}", *how), environment())
    reach_stored(process, bucket, url, "teacher", "step-00000004")
    while bucket.exists("short-lived"):
        with contextlib.suppress(OSError):  # an upload may come in between
            bucket.rm("short-lived", recursive=True)
    code, output = finish(process)
    assert code != 0
    assert "a checkpoint was written but not copied: the file can't be" in output
    assert "2 consecutive checkpoints could not be copied" in output
    assert "exitcode  : 2" in output


def test_another_config_is_refused_or_set_aside_in_the_storage_too(bucket, tmp_path):
    url = "s3://runs/updated"

    def command(run: str, limit: int) -> list[str]:
        overrides = (f"run.storage={url}", f"data.limit={limit}")
        return [*launch(tmp_path / run, *overrides)[2:], "--stages", "pack,index"]

    code, output = alone(*command("1", 400))
    assert code == 0, output[-4000:]
    before = record_files(bucket, url, "shards")
    code, output = alone(*command("2", 300))
    assert code == 2
    assert "data.limit" in output
    assert "400 -> 300" in output
    code, output = alone(*command("2", 300), "--update")
    assert code == 0, output[-4000:]
    assert record_files(bucket, url, "shards.old-1") == before
    assert len(record_files(bucket, url, "shards")) < len(before)

    chosen = (f"run.storage={url}", "data.limit=300")
    assert planned(tmp_path / "1", *chosen)[0]["index"] == "complete"
    code, output = alone(*command("1", 300))  # its folder still has what was set aside elsewhere
    assert code == 0, output[-4000:]
    assert "the run has continued elsewhere" in output
    assert output.count("complete, skipped") == 2
