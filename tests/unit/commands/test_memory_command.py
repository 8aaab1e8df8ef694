"""``cnn2gnn memory``: what it says about what it was given."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.model import memory
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.packing.packers import pack_parquet
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.editing import Added
from cnn2gnn_dist.inference.memory import edits
from cnn2gnn_dist.inference.memory.new_classes import Trade
from tests.support.models import pictures, rows_of, write_model
from tests.support.shards import encode_image


def test_add_names_the_files_that_it_leaves_out(tmp_path, capsys):
    model, folder = write_model(tmp_path / "m"), tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(pictures(3, seed=60)):
        (folder / f"{number}.png").write_bytes(encode_image(image))
        (folder / f"{number}.heic").write_bytes(b"a phone's own format")
    assert cli.main(["memory", "add", str(model), str(folder), "--class", "class 1"]) == 0
    told = capsys.readouterr()
    assert "adding 3 images" in told.out
    assert f"{folder}: left out: 3 .heic" in told.err


def forgotten(model, capsys, *keys: str) -> str:
    capsys.readouterr()
    assert cli.main(["memory", "forget", str(model), *keys]) == 0
    return capsys.readouterr().out


def test_forget_names_the_images_that_no_list_leaves_out(tmp_path, capsys):
    """Keys of added images are file names; in a training the same image has another key."""
    model, photo = write_model(tmp_path / "m"), tmp_path / "photo1.png"
    photo.write_bytes(encode_image(pictures(1, seed=60)[0]))
    assert cli.main(["memory", "add", str(model), str(photo), "--class", "class 1"]) == 0
    told = forgotten(model, capsys, "photo1.png", "img-3")
    assert "except 1 that were added to the memory" in told
    assert "keep these files out of the training images yourself: photo1.png\n" in told
    assert "2 keys are in" in told
    told = forgotten(model, capsys, "img-4")
    assert "except" not in told
    assert "row numbers" not in told


def test_forget_says_that_keys_of_parquet_and_cifar_are_row_numbers(tmp_path, capsys):
    """Without the forgotten row, the list would leave out the image that was after it."""
    images, labels = pictures(6), np.arange(6) % 3
    columns = {"image": [encode_image(one) for one in images], "label": labels}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    shards = pack_parquet([tmp_path / "a.parquet"], tmp_path / "shards", prefix="train")
    keys = index(shards, progress=False).keys.to_pylist()
    folder = write_model(tmp_path / "m")
    rows = rows_of(Classifier.open(folder, device="cpu").network, images, labels, keys)
    shutil.rmtree(folder / "memory")
    edits.create(folder / "memory", rows, ["a", "b", "c"], "of Parquet", np.empty(0, np.int64))
    assert f"keys like {keys[2]} are row numbers" in forgotten(folder, capsys, keys[2])


@pytest.mark.parametrize(("right", "images"), [(0, 5), (1, 5), (5, 5), (3, 40), (70, 100)])
def test_the_interval_of_a_share_is_wilsons(right, images):
    expected = binomtest(right, images).proportion_ci(method="wilson")
    assert memory.wilson(right / images, images) == pytest.approx(tuple(expected), abs=1e-6)


def test_the_predicted_accuracy_of_few_images_is_an_interval():
    """Of 5 images of a class of CIFAR-10, 6 % were predicted and 14.5 % of others found."""
    trades = (Trade(1.0, 0.1, 70.0, 20.0), Trade(2.0, 0.2, 69.0, None))
    done = Added(None, "x", ["a"] * 5, old_before=71.0, trades=trades, old_loss=1.0, judged_on=5.0)
    lines = memory.trade_table(done).splitlines()
    assert lines[2].split() == [
        "1",
        "70.0",
        "%",
        "20.0",
        "%",
        "(4",
        "to",
        "62)",
        "<-",
        "this",
        "one",
        "(--old-loss)",
    ]
    assert lines[3].split() == ["2", "69.0", "%", "?"]
