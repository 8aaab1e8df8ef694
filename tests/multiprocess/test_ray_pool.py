"""Work distributed to Ray actors: every item once, whichever actor dies; whole shards by ``predict``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.runtime.ray import pool as ray_pool
from tests.support.models import pictures, write_model
from tests.support.pool_work import squaring
from tests.support.shards import encode_image

pytestmark = pytest.mark.ray


def work_off(items: list[int], notes: Path, **options: int) -> dict[int, int]:
    done = list(ray_pool.work_off(items, squaring, {"notes": notes, **options}, actors=2, cpus=0.5))
    assert len(done) == len({item for item, _ in done})
    return dict(done)


def test_an_item_whose_actor_dies_is_done_by_its_successor(
    ray_cluster: None, tmp_path: Path
) -> None:
    items = [1, 2, 3, 4, 5, 6]
    assert work_off(items, tmp_path) == {item: item**2 for item in items}
    calls = {item: (tmp_path / str(item)).read_text() for item in items}
    assert calls == {1: "x", 2: "x", 3: "xx", 4: "x", 5: "x", 6: "xx"}


def test_an_item_that_kills_every_actor_is_named(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="actors died 3 times of 7"):
        work_off([1, 7], tmp_path)
    assert (tmp_path / "7").read_text() == "xxx"


def test_an_error_that_a_user_can_fix_arrives_as_it_is(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such number") as raised:
        work_off([1, 2], tmp_path, refuse=2)
    assert raised.value.remedy == "another number"


def test_no_room_for_an_actor_is_reported(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "START_SECONDS", 0.2)
    with pytest.raises(UserError, match="no room for an actor of 1000 CPUs"):
        list(ray_pool.work_off([1], squaring, {"notes": tmp_path}, actors=1, cpus=1000))


def test_predict_shares_its_inputs_out_to_actors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        folder = tmp_path / f"part-{number}"
        folder.mkdir()
        for row, image in enumerate(pictures(3, seed=number)):
            (folder / f"{row}.png").write_bytes(encode_image(image))
    (tmp_path / "part-2" / "1.png").write_bytes(b"no image")
    (tmp_path / "bad.tar").write_bytes(b"no shard")
    model, inputs = write_model(tmp_path / "m"), [f"part-{n}" for n in range(4)]
    call = ["predict", "--model", "m", "bad.tar", *inputs, "--out", "answers/", "--actors", "2"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-m", "cnn2gnn_dist", *call],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "12 images of 4 inputs" in ended.stdout
    assert "part-2/1.png: not readable as an image" in ended.stderr
    assert "1 input was not answered" in ended.stderr
    assert "where:  bad.tar" in ended.stderr

    monkeypatch.chdir(tmp_path)
    expected = Classifier.open(model, device="cpu").predict(inputs, top=3)
    rows = [row for n in range(4) for row in pq.read_table(f"answers/part-{n}.parquet").to_pylist()]
    assert [row["image"] for row in rows] == [answer.name for answer in expected]
    assert [row["class"] for row in rows] == [answer.label for answer in expected]

    call.remove("bad.tar")
    assert cli.main(call) == 1  # nothing is left to do, so Ray is not started
    assert "0 images of 0 inputs, 4 inputs were already answered" in capsys.readouterr().out
    assert cli.main(["predict", "--model", "m", *inputs, "--actors", "2"]) == 2
    assert "--out FOLDER/" in capsys.readouterr().err
