"""Decisions of an audit become a relabel list, which also holds what was forgotten."""

import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.data.index.relabel import read_relabel
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.memory import edits, store
from cnn2gnn_dist.inference.memory.changes import changes
from tests.support.models import write_model


def test_forgotten_images_stay_left_out_of_a_training_with_the_list(tmp_path, capsys):
    """``data.relabel`` takes one file: with two lists, one of them would not be applied."""
    model = write_model(tmp_path / "m")
    editing.forget(Classifier.open(model, device="cpu"), ["img-3", "img-4"])
    (tmp_path / "labels.csv").write_text("key,class\nimg-1,class 2\nimg-2,drop\n")
    assert cli.main(["audit", str(model), "--fix", str(tmp_path / "labels.csv")]) == 0
    told = capsys.readouterr().out
    assert "2 images that were forgotten stay left out" in told
    made = read_relabel(model / "audit" / "relabel.csv")
    assert {key: one.name for key, one in made.items()} == {
        "img-1": "class 2", "img-2": None, "img-3": None, "img-4": None,
    }  # fmt: skip
    assert not made["img-3"].required  # another training set may not have it
    assert made["img-2"].required


def test_a_decision_saved_before_an_image_was_forgotten_does_not_count(tmp_path, capsys):
    model = write_model(tmp_path / "m")
    editing.forget(Classifier.open(model, device="cpu"), ["img-3", "img-4"])
    (tmp_path / "labels.csv").write_text("key,class\nimg-1,class 2\nimg-3,class 2\nimg-4,drop\n")
    assert cli.main(["audit", str(model), "--fix", str(tmp_path / "labels.csv")]) == 0
    told = capsys.readouterr()
    assert "decisions that do not count (1)" in told.err
    assert "stay left out: img-3\n" in told.err
    assert "1 image gets a class, 0 are left out" in told.out
    made = read_relabel(model / "audit" / "relabel.csv")
    assert {key: (one.name, one.required) for key, one in made.items()} == {
        "img-1": ("class 2", True), "img-3": (None, False), "img-4": (None, False),
    }  # fmt: skip


def test_edits_of_the_memory_are_in_the_list_unless_decided_otherwise(tmp_path, capsys):
    """A training with the list would otherwise have the labels from before ``memory relabel``."""
    folder = write_model(tmp_path / "m")  # img-N is of class N % 3
    model = Classifier.open(folder, device="cpu")
    for key, number in (("img-5", 0), ("img-6", 1), ("img-7", 0), ("img-7", 2), ("img-10", 0)):
        editing.relabel(model, [key], f"class {number}")
    editing.relabel(model, ["img-10"], "class 1")  # as it was
    editing.remove(model, ["img-8", "img-9"])
    (tmp_path / "labels.csv").write_text("key,class\nimg-1,drop\nimg-6,class 2\nimg-9,class 1\n")
    how = ["audit", str(folder), "--fix", str(tmp_path / "labels.csv")]
    assert cli.main(how) == 0
    told = capsys.readouterr()
    assert (
        "with 3 edits of the memory: relabeled 2 images, removed 1 image, left out here" in told.out
    )
    made = read_relabel(folder / "audit" / "relabel.csv")
    assert {key: (one.name, one.required) for key, one in made.items()} == {
        "img-1": (None, True), "img-5": ("class 0", True), "img-6": ("class 2", True),
        "img-7": ("class 2", True), "img-8": (None, False), "img-9": ("class 1", True),
    }  # fmt: skip
    assert "compacted" not in told.err

    editing.compact(model)  # nothing tells any longer what the labels were
    editing.relabel(model, ["img-11"], "class 1")
    assert cli.main(how) == 2
    assert "img-9" in capsys.readouterr().err
    (tmp_path / "labels.csv").write_text("key,class\nimg-1,drop\n")
    assert cli.main(how) == 0
    assert "relabeled or removed in it before that are not in the list" in capsys.readouterr().err
    made = read_relabel(folder / "audit" / "relabel.csv")
    assert {key: one.name for key, one in made.items()} == {"img-1": None, "img-11": "class 1"}


@pytest.mark.parametrize("killed", [True, False])
def test_edits_are_not_read_across_a_compaction_that_numbers_the_rows_anew(
    tmp_path, monkeypatch, killed
):
    """Of one that was killed the versions before it are left; one may also come while they are read."""
    model = Classifier.open(write_model(tmp_path / "m"), device="cpu")
    root = model.memory.root
    editing.remove(model, ["img-0", "img-3"])
    editing.relabel(model, ["img-5"], "class 0")
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(
                edits.turns, "drop_all_but", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                editing.compact(model)
        assert store.numbers(root) == [0, 1, 2, 3]
    else:
        reads = store.numbers

        def compacted_first(folder):
            monkeypatch.undo()
            editing.compact(Classifier.open(model.folder, device="cpu"))
            return reads(folder)

        monkeypatch.setattr(store, "numbers", compacted_first)
    assert changes(root) == ({}, 0, 3)
    editing.relabel(Classifier.open(model.folder, device="cpu"), ["img-7"], "class 2")
    assert changes(root) == ({"img-7": "class 2"}, 0, 3)


def test_two_decisions_on_one_image_are_refused_and_nothing_is_written(tmp_path, capsys):
    model = write_model(tmp_path / "m")
    labels = tmp_path / "labels.csv"
    labels.write_text("key,class\nimg-1,class 2\nimg-2,drop\nimg-1,class 0\n")
    assert cli.main(["audit", str(model), "--fix", str(labels)]) == 2
    assert "two decisions on 'img-1', in lines 2 and 4" in capsys.readouterr().err
    assert not (model / "audit").exists()
