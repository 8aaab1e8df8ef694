"""User errors, in complete runs."""

from __future__ import annotations

import numpy as np

from tests.support import own_mounts
from tests.support.runs import MICRO, alone
from tests.support.shards import make_shards, random_images
from tests.unit.pipeline.test_bad_input import shards  # noqa: F401 (fixtures)


def launch(*arguments: str) -> tuple[int, str]:
    """launch/train.py as a single process."""
    return alone("--config", "demo", *MICRO, *arguments)


def refused(done: tuple[int, str], *parts: str) -> None:
    """Exit code 2, all parts in the message, no traceback."""
    code, said = done
    assert code == 2, said
    for part in (*parts, "where:", "remedy:"):
        assert part in said
    assert "Traceback" not in said


def of_shards(shards, tmp_path, *more: str) -> list[str]:
    return [
        "data.source=shards",
        f"data.train={shards[0].parent}/*.tar",
        "data.holdout=0.25",
        f"run.dir={tmp_path}/run",
        *more,
    ]


def test_folder_that_is_not_a_runs(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    refused(launch(f"run.dir={tmp_path}"), str(tmp_path), "is not a run folder", "run.dir=")
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert not (tmp_path / "config.yaml").exists()


def test_folder_of_another_config_is_refused_then_set_aside(tmp_path):
    run = f"run.dir={tmp_path}/run"
    only = ("--stages", "pack,index")
    assert launch(run, *only)[0] == 0
    before = sorted(path.name for path in (tmp_path / "run" / "shards").iterdir())
    refused(launch(run, "data.shard_size=32", *only), "data.shard_size: 64 -> 32", "--update")
    assert sorted(path.name for path in (tmp_path / "run" / "shards").iterdir()) == before
    assert launch(run, "data.shard_size=32", "--update", *only)[0] == 0
    assert (tmp_path / "run" / "shards.old-1" / "train-000000.tar").exists()


def test_missing_shards(tmp_path):
    done = launch("data.source=shards", "data.train=/nowhere/*.tar", f"run.dir={tmp_path}/run")
    refused(done, "/nowhere/*.tar")


def test_truncated_shard(shards, tmp_path):
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[: len(data) // 2 + 100])
    refused(launch(*of_shards(shards, tmp_path), "--stages", "index"), str(shards[1]))


def test_shard_changed_after_indexing(shards, tmp_path):
    arguments = of_shards(shards, tmp_path, "teacher.global_batch=8")
    assert launch(*arguments, "--stages", "index")[0] == 0
    shards[2].unlink()
    refused(launch(*arguments, "--stages", "index,teacher"), "data.train: 1 removed", "--update")


def test_fewer_samples_than_a_global_batch(shards, tmp_path):
    arguments = of_shards(shards, tmp_path, "teacher.global_batch=64", "--stages", "index,teacher")
    refused(
        launch(*arguments),
        "48 training images are fewer than one global batch of 64",
        "teacher.global_batch",
    )


def test_corrupt_images_up_to_the_limit_are_reported_and_beyond_it_stop(tmp_path):
    images = random_images(64, 16, 16)
    shards = make_shards(
        tmp_path / "shards", images, np.arange(64) % 4, shard_size=16, suffix="jpg"
    )
    data = bytearray(shards[0].read_bytes())
    start = data.index(b"\xff\xd8")
    data[start + 2 : start + 60] = bytes(58)
    shards[0].write_bytes(bytes(data))
    arguments = of_shards(shards, tmp_path, "teacher.global_batch=8", "teacher.epochs=2")
    arguments.append(f"data.test={shards[1]}")
    arguments += ["--stages", "index,teacher"]
    refused(
        launch(*arguments),
        "corrupt images",
        "data.max_corrupt",
        str(shards[0]),
    )
    code, said = launch(*arguments, "data.max_corrupt=0.5", "--update")
    assert code == 0, said
    assert "1 corrupt" in said


def test_too_few_images_for_the_student_end_a_run_before_the_teacher(shards, tmp_path):
    done = launch(*of_shards(shards, tmp_path, "graph.candidates=48"))
    refused(done, "48 candidates for each of 48 training images", "graph.candidates=47 or less")
    assert (tmp_path / "run" / "manifest" / "done.json").exists()
    assert not (tmp_path / "run" / "teacher").exists()


ON_A_SMALL_DISK = """
import contextlib, io, json, subprocess, sys
from cnn2gnn_dist import cli
folder = sys.argv[1]
mount = lambda how: subprocess.run(["mount", "-t", "tmpfs", "-o", how, "none", folder], check=True)
said = []
for how in ("size=40k", "remount,size=10m"):
    mount(how)
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        code = cli.main(["pack", "--config", "demo", "data.limit=60", f"run.dir={folder}/run"])
    said.append([code, text.getvalue()])
print(json.dumps(said))
"""


@own_mounts.needed
def test_a_disk_that_fills_up_while_packing(tmp_path):
    """It ends with a sentence, and the same command continues once there is space."""
    (full, what), (again, _) = own_mounts.run("-c", ON_A_SMALL_DISK, str(tmp_path))
    assert (full, again) == (2, 0)
    assert "disk full: No space left on device" in what
    assert "same command again" in what
