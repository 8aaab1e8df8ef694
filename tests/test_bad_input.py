"""What users get wrong: a message with what, where and remedy, exit code 2, no traceback."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import make_shards, random_images
from runs import MICRO, environment

from cnn2gnn_dist import cli, pipeline, settings
from cnn2gnn_dist.data.reader import Batch
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.stages.context import CorruptCount


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """launch/train.py as a single process."""
    return subprocess.run(
        [sys.executable, "launch/train.py", "--config", "demo", *MICRO, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
    )


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, all parts said, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    for part in (*parts, "where:", "remedy:"):
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def shards(tmp_path):
    images = random_images(64, 16, 16)
    labels = np.arange(64) % 4
    return make_shards(tmp_path / "shards", images, labels, shard_size=16)


def of_shards(shards, tmp_path, *more: str) -> list[str]:
    return [
        "data.source=shards",
        f"data.train={shards[0].parent}/*.tar",
        "data.holdout=0.25",
        f"run.dir={tmp_path}/run",
        *more,
    ]


@pytest.mark.parametrize(
    ("override", "where", "remedy"),
    [
        ("student.epoch=3", "student.epoch", "student.epochs"),
        ("epochs=3", "epochs", "epochs"),
        ("student.epochs=many", "student.epochs", "cnn2gnn config"),
        ("student.epochs=0", "student.epochs", "cnn2gnn config"),
        ("graph.neighbours=20", "graph.neighbours", "graph.neighbours=9"),
        ("device=gpu", "device", "cnn2gnn config"),
        ("student=3", "student", "cnn2gnn config"),
        ("student.epochs", "student.epochs", "student.epochs=20"),
    ],
)
def test_config_mistakes_name_the_field_and_the_nearest(override, where, remedy, capsys):
    assert cli.main(["run", "--config", "demo", override, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert where in said.split("where:")[1].split("remedy:")[0]
    assert remedy in said.split("remedy:")[1]


def test_unknown_config_names_the_presets(capsys):
    assert cli.main(["run", "--config", "cifar"]) == 2
    assert "cifar10" in capsys.readouterr().err


def test_broken_yaml(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("student: {epochs: 3")
    assert cli.main(["run", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_asked_for_where_there_is_none():
    with pytest.raises(UserError, match="GPU") as caught:
        pipeline.choose_device("cuda")
    assert caught.value.where == "device"


def test_folder_that_is_not_a_runs(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    refused(launch(f"run.dir={tmp_path}"), str(tmp_path), "not a run's", "run.dir=")
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.slow
def test_folder_of_another_config_is_refused_then_set_aside(tmp_path):
    run = f"run.dir={tmp_path}/run"
    only = ("--stages", "pack,index")
    assert launch(run, *only).returncode == 0
    before = sorted(path.name for path in (tmp_path / "run" / "shards").iterdir())
    refused(launch(run, "data.shard_size=32", *only), "data.shard_size: 64 -> 32", "--update")
    assert sorted(path.name for path in (tmp_path / "run" / "shards").iterdir()) == before
    assert launch(run, "data.shard_size=32", "--update", *only).returncode == 0
    assert (tmp_path / "run" / "shards.old-1" / "train-000000.tar").exists()


def test_missing_shards(tmp_path):
    done = launch("data.source=shards", "data.train=/nowhere/*.tar", f"run.dir={tmp_path}/run")
    refused(done, "/nowhere/*.tar")


def test_truncated_shard(shards, tmp_path):
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[: len(data) // 2 + 100])
    refused(launch(*of_shards(shards, tmp_path), "--stages", "index"), str(shards[1]))


@pytest.mark.slow
def test_shard_changed_after_indexing(shards, tmp_path):
    arguments = of_shards(shards, tmp_path, "teacher.global_batch=8")
    assert launch(*arguments, "--stages", "index").returncode == 0
    shards[2].unlink()
    refused(launch(*arguments, "--stages", "index,teacher"), "inputs changed", "--update")


@pytest.mark.slow
def test_fewer_samples_than_a_global_batch(shards, tmp_path):
    arguments = of_shards(shards, tmp_path, "teacher.global_batch=64", "--stages", "index,teacher")
    refused(launch(*arguments), "48 samples are fewer than one global batch of 64", "global_batch")


@pytest.mark.slow
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
    done = launch(*arguments, "data.max_corrupt=0.5", "--update")
    assert done.returncode == 0, done.stderr
    assert "1 corrupt" in done.stdout


def test_corrupt_samples_count_once_however_often_they_are_read():
    count = CorruptCount(limit=0.02, total=100)
    batch = Batch(
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros(2, np.int64),
        np.array([7, 8]),
        np.array([False, True]),
        ["a.tar: k7: truncated"],
    )
    for _ in range(5):
        count.note(batch)
    assert count.check() == {7: "a.tar: k7: truncated"}
    count.seen.update({1: "b", 2: "c"})
    with pytest.raises(UserError, match="3 corrupt images among 100"):
        count.check()


def test_more_candidates_than_nodes_names_the_field(tmp_path):
    from cnn2gnn_dist.graph import knn

    base = np.eye(5, dtype=np.float32)
    with pytest.raises(UserError, match=r"5 neighbours .* 5 nodes") as caught:
        knn.search(base, base, 5, exclude_Q=np.arange(5))
    assert caught.value.where == "graph.candidates"


def test_overrides_read_numbers_as_people_write_them():
    config = settings.load("demo", ["teacher.lr=1e-3", "graph.fanouts=[14, 2]", "data.test=null"])
    assert config.teacher.lr == 0.001
    assert config.graph.fanouts == (14, 2)
