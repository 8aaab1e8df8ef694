"""Edits of a model that another one takes the place of while they wait, or decode their images."""

from __future__ import annotations

import os

import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.memory import turns
from tests.support.models import pictures, write_model


@pytest.fixture
def other(tmp_path):
    """Another network's model, whose memory was edited once."""
    folder = write_model(tmp_path / "other", seed=5)
    editing.remove(Classifier.open(folder, device="cpu"), ["img-20"])
    return folder


def contents(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_model_that_is_replaced_while_images_are_decoded(model, other):
    def images():
        yield pictures(1, seed=50)[0]
        assert cli.main(["export", str(other), "--to", str(model.folder), "--force"]) == 0

    with pytest.raises(UserError, match="another model has taken the place") as caught:
        editing.add(model, images(), "class 0")
    assert caught.value.where == str(model.folder)
    assert contents(model.folder) == contents(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: editing.add(model, pictures(1, seed=50)[0], "class 0"),
        lambda model: editing.remove(model, ["img-1"]),
        lambda model: editing.relabel(model, ["img-1"], "class 0"),
        lambda model: editing.forget(model, ["img-1"]),
        editing.undo,
        editing.compact,
    ],
)
def test_a_model_that_is_replaced_while_an_edit_waits(model, other, monkeypatch, change):
    editing.remove(model, ["img-30"])
    before = contents(other)

    class Late(turns.FileLock):
        def acquire(self, *arguments, **options):
            if other.exists():
                os.rename(model.folder, model.folder.with_name("old"))
                os.rename(other, model.folder)
            return super().acquire(*arguments, **options)

    monkeypatch.setattr(turns, "FileLock", Late)
    with pytest.raises(UserError, match="another model has taken the place"):
        change(model)
    assert contents(model.folder) == before
    turns_again = Classifier.open(model.folder, device="cpu")
    editing.remove(turns_again, ["img-1"])  # nothing is held


@pytest.mark.parametrize("error", [turns.Timeout, FileNotFoundError])
def test_a_model_that_is_taken_away_while_an_edit_waits(model, error):
    root, away = model.memory.root, model.folder.with_name("away")

    class Late(turns.FileLock):
        def acquire(self, *arguments, **options):
            if model.folder.exists():
                os.rename(model.folder, away)
            raise error(str(root))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "FileLock", Late)
        with pytest.raises(UserError, match="this memory is gone"):
            editing.remove(model, ["img-1"])
    assert not model.folder.exists()
