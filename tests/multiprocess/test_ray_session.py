"""However the driver of a stream ends, it leaves no process, no file and no shared memory behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist.data.index.manifest import index
from tests.support import REPOSITORY, runs, short_folder
from tests.support.shards import make_shards, random_images

SECONDS = 60.0
"""Seconds after which what is left counts as left behind: a limit for loaded machines, not a measurement."""

NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 and shutil.which("unshare") else []
"""With a private /dev/shm, its use by other processes is not counted."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the test's subreaper is Linux's")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shutdown")
    shards = make_shards(folder / "s", random_images(40), np.arange(40) % 7)
    index(shards, progress=False).save(folder / "m.arrow")
    return folder / "m.arrow"


@pytest.fixture
def place() -> Iterator[Path]:
    """A private temporary folder of the driver."""
    with short_folder() as folder:
        yield folder


def end(
    place: Path,
    tmp_path: Path,
    command: list[str],
    number: int | None,
    trigger: str = "streaming",
    awaited: Sequence[str] = (),
) -> dict:
    """Exit code and output of a driver that gets this signal when it prints the trigger and has processes of the
    awaited names; the processes that it had then, and what it left behind."""
    environment = runs.bare_environment(tmp_path / "home") | {
        "TMPDIR": str(place),
        "PYTHONPATH": str(REPOSITORY),
    }
    job = {
        "command": [sys.executable, *command],
        "environment": environment,
        "signal": number,
        "trigger": trigger,
        "awaited": list(awaited),
        "seconds": SECONDS,
        "private": bool(NAMESPACE),
        "result": str(tmp_path / "result.json"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    reaper = [
        sys.executable,
        str(REPOSITORY / "tests/support/reaper.py"),
        str(tmp_path / "job.json"),
    ]
    subprocess.run([*NAMESPACE, *reaper], check=True, timeout=900)
    result = json.loads((tmp_path / "result.json").read_text())
    # A token there would be required by the next Ray that this user starts.
    assert not (tmp_path / "home" / ".ray").exists()
    result["files"] = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    return result


def assert_nothing_left(result: dict) -> None:
    assert result["left"] == [], result["output"]
    assert result["files"] == []
    assert result["shared"] == []


@pytest.mark.ray
@pytest.mark.parametrize(
    ("how", "number", "code"),
    [
        ("stop", signal.SIGTERM, 143),
        ("stop", signal.SIGKILL, -signal.SIGKILL),
        ("stop", signal.SIGINT, 1),
        ("return", None, 0),
        ("raise", None, 1),
    ],
)
def test_nothing_is_left_of_a_ray_driver(manifest, place, tmp_path, how, number, code):
    command = ["-m", "tests.support.stream_driver", str(manifest), "ray", how]
    # There is something that could be left behind: the readers, Ray's daemons, the watcher.
    parts = ("raylet", "gcs_server", "ray::ReaderActor", "ray::DashboardAgent", "watcher.py")
    awaited = [part[:15] for part in parts]  # a process name has at most 15 characters
    result = end(place, tmp_path, command, number, awaited=awaited)
    assert result["code"] == code, result["output"]
    if number == signal.SIGINT:
        assert result["output"].rstrip().endswith("KeyboardInterrupt")
    names = " ".join(result["started"])
    assert [part for part in awaited if part not in names] == []
    assert_nothing_left(result)
    if how == "raise":
        assert "the trainer is broken" in result["output"]


@pytest.mark.parametrize(
    ("how", "number", "code"),
    [
        ("stop", signal.SIGTERM, -signal.SIGTERM),
        ("stop", signal.SIGKILL, -signal.SIGKILL),
        ("stop", signal.SIGINT, -signal.SIGINT),
        ("return", None, 0),
        ("raise", None, 1),
    ],
)
@pytest.mark.parametrize("backend", ["local", "processes"])
def test_nothing_is_left_of_a_driver_without_ray(
    manifest, place, tmp_path, backend, how, number, code
):
    command = ["-m", "tests.support.stream_driver", str(manifest), backend, how]
    result = end(place, tmp_path, command, number)
    assert result["code"] == code, result["output"]
    assert len(result["started"]) >= (2 if backend == "processes" else 0)
    assert_nothing_left(result)
    for noise in ("resource_tracker", "leaked", "Exception ignored"):
        assert noise not in result["output"]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_is_left_of_a_run_but_its_folder(place, tmp_path, number, code):
    """Ranks with their own readers, under the command; Ray's logs are kept next to the results."""
    run = tmp_path / "run"
    command = ["-m", "cnn2gnn_dist", "run", "--config", "demo", *runs.MICRO, f"run.dir={run}"]
    result = end(place, tmp_path, command, number, trigger="teacher  step")
    assert result["code"] == code, result["output"]
    names = " ".join(result["started"])
    assert "ray::_Rank" in names or "ray::rank" in names
    assert "ReaderActor" in names
    assert_nothing_left(result)
    assert set(result["listening"]) == {"127.0.0.1"}, result["listening"]
    assert (run / "ray-logs" / "raylet.out").is_file()
    if number == signal.SIGTERM:
        assert f"Ray's logs were kept in {run}/ray-logs" in result["output"]
        assert "stopped by SIGTERM; the same command resumes" in result["output"]
        assert "Traceback" not in result["output"]
