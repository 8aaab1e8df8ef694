"""What `cnn2gnn init` finds in folders, Parquet files and shards, and what it refuses."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist.commands.init import command as init
from cnn2gnn_dist.commands.init import recipe, speed
from cnn2gnn_dist.commands.init.fitting import Estimate
from cnn2gnn_dist.commands.init.sources import find_source
from cnn2gnn_dist.commands.init.speed import Machine, Speed
from cnn2gnn_dist.commands.init.survey import look
from cnn2gnn_dist.errors import UserError
from tests.support.shards import encode_image, make_shards, random_images


def folder_of(root, counts, side=(40, 48)):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number, image in enumerate(random_images(count, *side, seed=len(name))):
            (root / name / f"{number}.jpg").write_bytes(encode_image(image, "jpg"))
    return root


def test_a_folder_is_counted_and_what_cannot_be_read_is_named(tmp_path):
    root = folder_of(tmp_path / "photos", {"cat": 20, "dog": 12, "owl": 11})
    (root / "cat" / "bad.jpg").write_bytes(b"not an image")
    whole = (root / "dog" / "0.jpg").read_bytes()
    (root / "dog" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    seen = look(find_source(str(root)))
    assert seen.classes == ["cat", "dog", "owl"]
    assert seen.count_C.tolist() == [21, 12, 11]
    assert seen.short_side == 40
    assert sum(seen.unreadable.values()) == 2
    assert seen.share == pytest.approx(2 / 44, rel=0.3)
    assert seen.formats == {"jpg": 42}


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "shards"])
def test_train_and_val_parts_are_found(tmp_path, kind):
    images, labels = random_images(24, 32, 32), np.arange(24) % 2
    if kind == "imagefolder":
        for part in ("train", "val", "test"):
            folder_of(tmp_path / part, {"a": 12, "b": 12})
    elif kind == "parquet":
        rows = [{"bytes": encode_image(image), "path": None} for image in images]
        for part in ("train-0", "train-1", "test-0"):
            pq.write_table(pa.table({"img": rows, "label": labels}), tmp_path / f"{part}.parquet")
    else:
        for part in ("train", "val"):
            make_shards(tmp_path, images, labels, shard_size=12, prefix=part)
    source = find_source(str(tmp_path))
    assert source.kind == kind
    seen = look(source)
    assert seen.images == (48 if kind == "parquet" else 24)
    assert seen.held == 24
    assert seen.columns[0] == ("img" if kind == "parquet" else "image")
    if kind == "imagefolder":
        assert source.test == str(tmp_path / "val")
        assert source.unused == ("test",)


@pytest.mark.parametrize("kind", ["imagefolder", "shards"])
@pytest.mark.parametrize(
    ("others", "held", "unused", "words"),
    [
        (["val", "test"], "test", {"val"}, "' is held out"),
        (["val"], None, {"val"}, "so a share of the training images is held out"),
        (["test"], "test", set(), None),
    ],
)
def test_validation_images_of_trainval_are_not_held_out(
    tmp_path, kind, others, held, unused, words
):
    """They are trained on: ``trainval`` is both."""
    for part in ("trainval", *others):
        if kind == "imagefolder":
            folder_of(tmp_path / part, {"a": 12, "b": 12})
        else:
            make_shards(tmp_path, random_images(24, 32, 32), np.arange(24) % 2, prefix=part)
    source = find_source(str(tmp_path))
    seen = look(source)
    assert (seen.images, seen.held) == (24, 24 if held else None)
    assert (source.test is not None and Path(str(source.test)).name.startswith("test")) == bool(
        held
    )
    assert {name.partition("-")[0] for name in source.unused} == unused
    notes = [note for note in seen.notes if "by its name, 'trainval" in note]
    assert len(notes) == (words is not None)
    assert all(words in note for note in notes)
    facts, machine = init.facts_of(seen), Machine(1, 2, "cpu")
    tree = recipe.tree(facts, machine, recipe.nets(facts, machine, None)[0], 8)
    estimate = Estimate({"teacher": 60.0})
    written = init._text(str(tmp_path), seen, init._Choice(tree, estimate, machine), 1)
    assert all(f"# Note: {note}" in written for note in notes)


def test_classes_may_be_missing_from_a_part(tmp_path):
    """From the held-out images, or from the training ones if the classes are named: a run accepts both."""
    images = random_images(24, 32, 32)
    make_shards(tmp_path, images, np.arange(24) % 3, prefix="train")
    make_shards(tmp_path, images[:12], np.arange(12) % 2, prefix="val")
    seen = look(find_source(str(tmp_path)))
    assert (seen.images, seen.held, seen.empty) == (24, 12, [])
    (tmp_path / "train-classes.json").write_text('["cat", "dog", "hen", "owl"]')
    (tmp_path / "val-classes.json").write_text('["cat", "dog"]')
    seen = look(find_source(str(tmp_path)))
    assert (seen.classes, seen.empty) == (["cat", "dog", "hen", "owl"], ["owl"])
    assert any("1 classes have no training images" in note for note in seen.notes)
    facts, machine = init.facts_of(seen), Machine(1, 2, "cpu")
    tree = recipe.tree(facts, machine, recipe.nets(facts, machine, None)[0], 8)
    assert init._with_data(tree, seen)["data"]["allow_empty_classes"] is True


@pytest.mark.parametrize("kind", ["folder", "parquet", "shards"])
def test_held_out_classes_that_the_run_would_refuse_are_refused(tmp_path, kind):
    for part, names in (("train", ["a", "b"]), ("val", ["a", "c"])):
        if kind == "folder":
            folder_of(tmp_path / part, dict.fromkeys(names, 12))
        elif kind == "parquet":
            images = [encode_image(one) for one in random_images(24, 20, 20)]
            table = pa.table({"image": images, "label": names * 12})
            pq.write_table(table, tmp_path / f"{part}-0.parquet")
        else:
            images, labels = random_images(24, 20, 20), np.arange(24) % 2
            make_shards(tmp_path, images, labels, prefix=part)
            (tmp_path / f"{part}-classes.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match="1 held-out classes are not among the training classes"):
        look(find_source(str(tmp_path)))


def test_a_class_that_was_not_among_the_shards_that_were_read_may_be_in_others(tmp_path):
    """Forty shards sorted by class, of which some are read."""
    labels = np.repeat(np.arange(40), 4)
    make_shards(tmp_path, random_images(160, 32, 32), labels, shard_size=4)
    seen = look(find_source(str(tmp_path)))
    assert seen.empty
    assert not [note for note in seen.notes if "no training images" in note]
    assert [note for note in seen.notes if note.startswith("the smallest class has about ")]
    facts, machine = init.facts_of(seen), Machine(1, 2, "cpu")
    tree = recipe.tree(facts, machine, recipe.nets(facts, machine, None)[0], 8)
    assert "allow_empty_classes" not in init._with_data(tree, seen)["data"]


def test_held_out_shards_are_not_taken_for_training_ones(tmp_path):
    for prefix in ("images", "test"):
        make_shards(tmp_path, random_images(8, 32, 32), np.arange(8) % 2, prefix=prefix)
    with pytest.raises(UserError, match="several splits"):
        find_source(str(tmp_path))


def made(tmp_path, what):
    if what == "one class":
        return folder_of(tmp_path / "one", {"cat": 12})
    if what == "single images":
        return folder_of(tmp_path / "single", {"cat": 1, "dog": 1})
    if what == "loose":
        folder_of(tmp_path, {"loose": 3})
        return tmp_path / "loose"
    if what == "no training part":
        folder_of(tmp_path / "parts" / "val", {"a": 2, "b": 2})
        folder_of(tmp_path / "parts" / "test", {"a": 2, "b": 2})
        return tmp_path / "parts"
    if what == "mixed":
        folder_of(tmp_path / "mixed", {"a": 2, "b": 2})
        make_shards(tmp_path / "mixed", random_images(4), [0, 1, 0, 1])
        return tmp_path / "mixed"
    if what == "empty class":
        (folder_of(tmp_path / "gap", {"a": 12, "b": 12}) / "c").mkdir()
        return tmp_path / "gap"
    if what == "text":
        (tmp_path / "notes" / "a").mkdir(parents=True)
        (tmp_path / "notes" / "a" / "x.txt").write_text("x")
        return tmp_path / "notes"
    if what in ("image", "packed"):
        data = encode_image(random_images(1)[0])
        (tmp_path / what).write_bytes(data if what == "image" else gzip.compress(data))
        return tmp_path / what
    (tmp_path / "empty").mkdir()
    return tmp_path / what


@pytest.mark.parametrize(
    ("what", "said", "remedy"),
    [
        ("empty", "the folder is empty", "folder of images for each class"),
        ("missing", "no such folder", "name a folder"),
        ("one class", "all 12 images are of one class ('cat')", "another class"),
        ("single images", "single image", "add images"),
        ("loose", "3 images but no class folders", "FOLDER/CLASS/IMAGE"),
        ("no training part", "none of them is for training", "'train'"),
        ("mixed", "folders of images and tar shards", "name one kind"),
        ("empty class", "'c'", "remove the folder"),
        ("text", "no images", "FOLDER/CLASS/IMAGE"),
        ("image", "PNG image", "name the folder"),
        ("packed", "gzip file", "unpack it, and name the folder"),
    ],
)
def test_what_cannot_be_trained_on_is_named_with_its_remedy(tmp_path, what, said, remedy):
    with pytest.raises(UserError) as caught:
        look(find_source(str(made(tmp_path, what))))
    assert said in caught.value.what
    assert remedy in caught.value.remedy


def parquet_of(path, columns, counts=60):
    rows = [{"bytes": encode_image(one), "path": None} for one in random_images(counts, 32, 32)]
    pq.write_table(pa.table({"image": rows, **columns}), path)
    return find_source(str(path))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"width": [24, 32, 40] * 20}, "its values are 24, 32, 40"),
        ({"id": list(range(60))}, "no two of its 60 values are equal"),
        ({"file": [f"{n}.jpg" for n in range(60)]}, "no two of its 60 values are equal"),
        ({"number": [10**9 + n % 2 for n in range(60)]}, "does not look like the classes"),
        ({"width": [24, 32, 40] * 20, "height": [1, 2, 3] * 20}, "width, height"),
    ],
)
def test_a_column_that_cannot_be_the_classes_is_named_and_refused(tmp_path, columns, said):
    source = parquet_of(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError) as caught:
        look(source)
    assert said in caught.value.what
    assert next(iter(columns)) in caught.value.what
    assert "--label-column NAME" in caught.value.remedy


@pytest.mark.parametrize(
    ("columns", "label_column", "said", "remedy"),
    [
        ({"score": [0.5] * 60}, None, "is of integers or text", "add a column `label`"),
        ({"label": [None] * 60}, None, "all rows are null", "another column: --label-column NAME"),
        ({"label": [0.0, 1.0] * 30}, None, "regression targets", "save the column as integers"),
        ({"my kind": [0, 1] * 30}, "kind", "no column 'kind'", "mean --label-column 'my kind'?"),
        ({"score": [0.5] * 60}, "kind", "no column 'kind'", "set --label-column NAME to the"),
    ],
)
def test_columns_of_labels_that_are_missing_are_named_with_what_init_accepts(
    tmp_path, columns, label_column, said, remedy
):
    with pytest.raises(UserError) as caught:
        look(parquet_of(tmp_path / "a.parquet", columns), label_column=label_column)
    assert said in caught.value.what
    assert remedy in caught.value.remedy
    assert "data." not in caught.value.remedy


def test_columns_of_images_are_found_or_named_with_what_init_accepts(tmp_path):
    data = [encode_image(one) for one in random_images(24, 32, 32)]
    rows = [{"bytes": one, "path": None} for one in data]
    labels = {"label": [0, 1] * 12}

    def seen(columns, name="a"):
        pq.write_table(pa.table(columns | labels), tmp_path / f"{name}.parquet")
        return look(find_source(str(tmp_path / f"{name}.parquet")))

    assert seen({"photo": rows, "digest": [b"1"] * 24}).columns == ("photo", "label")
    assert seen({"image": ["a.png"] * 24, "img": data}).columns == ("img", "label")
    for columns, said, remedy in (
        ({"front": rows, "back": rows}, "front, back", "name the right one 'image'"),
        ({"image": ["a.png"] * 24}, "'image' is string", "encoded images"),
        ({"pixels": [1.5] * 24}, "none of these columns holds images", "a column of bytes"),
    ):
        with pytest.raises(UserError) as caught:
            seen(columns)
        assert said in caught.value.what
        assert remedy in caught.value.remedy
    (tmp_path / "a.parquet").unlink()
    for part, name in (("train", "photo"), ("test", "picture")):
        pq.write_table(pa.table({name: rows} | labels), tmp_path / f"{part}-0.parquet")
    with pytest.raises(UserError, match=r"no column .photo., which train-0\.parquet has") as caught:
        look(find_source(str(tmp_path)))
    assert caught.value.where.endswith("test-0.parquet")


def test_a_guessed_column_of_labels_is_named(tmp_path):
    source = parquet_of(tmp_path / "a.parquet", {"species": [0, 1, 1] * 20})
    seen = look(source)
    assert seen.columns == ("image", "species")
    assert any("column 'species'" in note for note in seen.notes)
    facts, machine = init.facts_of(seen), Machine(1, 2, "cpu")
    tree = recipe.tree(facts, machine, recipe.nets(facts, machine, None)[0], 8)
    choice = init._Choice(tree, Estimate({"teacher": 60.0}), machine)
    assert "# Note: the classes are read from column 'species'" in init._text("a", seen, choice, 1)
    # A name that was given, a usual one, or ClassLabel's names: nothing is guessed.
    assert not look(source, label_column="species").guess
    usual = {"label": [0, 1, 1] * 20, "width": [24, 32, 40] * 20}
    assert not look(parquet_of(tmp_path / "b.parquet", usual)).guess
    feature = {"_type": "ClassLabel", "names": ["cat", "dog", "owl"]}
    known = {b"huggingface": json.dumps({"info": {"features": {"kind": feature}}}).encode()}
    table = pq.read_table(tmp_path / "a.parquet").rename_columns({"species": "kind"})
    pq.write_table(table.replace_schema_metadata(known), tmp_path / "c.parquet")
    seen = look(find_source(str(tmp_path / "c.parquet")))
    assert (seen.classes, seen.empty, seen.guess) == (["cat", "dog", "owl"], ["owl"], "")


def test_a_column_named_by_the_user_may_leave_gaps(tmp_path):
    source = parquet_of(tmp_path / "a.parquet", {"width": [1, 3] * 30})
    assert look(source, label_column="width").count_C.tolist() == [0, 30, 0, 30]
    folder = folder_of(tmp_path / "photos", {"cat": 12, "dog": 12})
    with pytest.raises(UserError, match="only Parquet files have columns"):
        look(find_source(str(folder)), label_column="width")


def test_an_existing_file_is_left_alone(tmp_path):
    out = tmp_path / "my.yaml"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists") as caught:
        init.command(str(tmp_path), str(out), 30)
    assert "--force" in caught.value.remedy
    assert out.read_text() == "mine"
    for minutes in (0, -3, math.inf, math.nan):
        with pytest.raises(UserError) as caught:
            init.command(str(tmp_path), str(tmp_path / "other.yaml"), minutes)
        assert caught.value.where == "--minutes"


def test_a_file_that_cannot_be_written_is_named_before_anything_is_timed(tmp_path, monkeypatch):
    (tmp_path / "my.yaml").mkdir()
    monkeypatch.setattr(init, "look", lambda source, **_: pytest.fail("the images were looked at"))
    with pytest.raises(UserError, match="can't be written to: it is a folder"):
        init.command(str(tmp_path), str(tmp_path / "my.yaml"), 30, force=True)


@pytest.mark.thorough
@pytest.mark.parametrize("fits", [2, 1, 0])
def test_networks_that_do_not_fit_into_a_gpu_are_not_chosen(tmp_path, monkeypatch, fits):
    seen = look(find_source(str(folder_of(tmp_path / "p", {"cat": 20, "dog": 20}, (64, 64)))))
    known = {"arch": "resnet18", "weights": "/w", "size": 64}  # two networks
    tried = []

    def time_of(stopwatch: speed.Stopwatch, config, num_classes: int, images: int) -> Speed | None:
        tried.append(config.student.stem)
        big = config.student.stem == "resnet18"
        return None if fits == 0 or (big and fits == 1) else Speed(0.01, 0.01, 0.01, 0.01, 0.01)

    monkeypatch.setattr(speed.Stopwatch, "time", time_of)
    if not fits:
        with pytest.raises(UserError, match="not even the smallest network fits"):
            init._choose(seen, Machine(1, 2, "cuda"), known, 600, False)
        return
    chosen = init._choose(seen, Machine(1, 2, "cuda"), known, 600, False).tree
    assert chosen["student"]["stem"] == ("resnet18" if fits == 2 else "resnet_tiny")
    assert len(tried) >= 1
