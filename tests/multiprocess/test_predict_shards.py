"""Whole shards over ranks: each input once, what is there is skipped, the answers those of one process."""

import os
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.inference.classifier import Classifier
from tests.support.models import pictures, write_model
from tests.support.runs import cnn2gnn
from tests.support.shards import encode_image


@pytest.fixture
def asked(tmp_path):
    """Five folders of three images, and a model."""
    for number in range(5):
        folder = tmp_path / f"part-{number}"
        folder.mkdir()
        for row, image in enumerate(pictures(3, seed=number)):
            (folder / f"{row}.png").write_bytes(encode_image(image))
    return write_model(tmp_path / "m"), [str(tmp_path / f"part-{n}") for n in range(5)]


def predict(model, out, inputs, rank, world):
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    command = ("predict", "--model", str(model), *inputs, "--out", f"{out}/")
    return cnn2gnn(*command, **ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def test_ranks_share_the_inputs_and_a_second_call_makes_what_is_missing(asked, tmp_path, capsys):
    model, inputs = asked
    out = tmp_path / "answers"
    ranks = [predict(model, out, inputs, rank, 2) for rank in range(2)]
    told = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    shares = [re.search(r": (\d+ images) of ", text) for text in told]
    assert sorted(share[1] for share in shares) == ["6 images", "9 images"]
    expected = Classifier.open(model, device="cpu").predict(inputs, top=3)
    found = [row for n in range(5) for row in pq.read_table(out / f"part-{n}.parquet").to_pylist()]
    assert [row["image"] for row in found] == [a.name for a in expected]
    np.testing.assert_array_equal(
        [row["probability"] for row in found], [a.probability for a in expected]
    )

    (out / "part-3.parquet").unlink()
    call = ["predict", "--model", str(model), *inputs, "--out", f"{out}/"]
    assert cli.main(call) == 0
    assert "3 images of 1 inputs, 4 inputs were already answered" in capsys.readouterr().out
    later = (out / "part-1.parquet").stat().st_mtime + 5
    os.utime(inputs[1], (later, later))  # changed since it was answered
    assert cli.main(call) == 0
    assert "3 images of 1 inputs, 4 inputs were already answered" in capsys.readouterr().out
    assert cli.main([*call, "--top", "1"]) == 2
    assert "answers from another model" in capsys.readouterr().err
    assert cli.main(["memory", "remove", str(model), "img-1"]) == 0
    assert cli.main(call) == 2
    assert "another version of its memory" in capsys.readouterr().err


def test_embeddings_are_written(asked, tmp_path):
    model, inputs = asked
    out = tmp_path / "z.parquet"
    assert cli.main(["embed", "--model", str(model), inputs[0], "--out", str(out)]) == 0
    rows = pq.read_table(out).to_pylist()
    expected = list(Classifier.open(model, device="cpu").embed(inputs[0]))
    assert [row["image"] for row in rows] == [name for name, _, _ in expected]
    np.testing.assert_array_equal([row["z"] for row in rows], [z for _, _, z in expected])
