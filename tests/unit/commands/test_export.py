"""``cnn2gnn export --force``: what a kill between its two renames leaves behind; where it is refused."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from pathlib import Path

import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.model.opening import opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier, load
from cnn2gnn_dist.inference.memory import store
from tests.support.models import write_model


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The place of a model that an export was about to replace: set aside, with none in its place."""
    target = write_model(tmp_path / "served")
    editing.remove(Classifier.open(target, device="cpu"), ["img-3"])
    os.rename(target, tmp_path / ".served.old")
    return target


def without(folder: Path, key: str) -> bool:
    memory = load(folder, device="cpu").required_memory()
    return key not in memory.keys(memory.live_ids)


def test_opening_it_says_where_the_model_is(killed):
    aside = killed.with_name(".served.old")
    for way in (load, Classifier.from_pretrained, lambda folder: opened(folder).__enter__()):
        with pytest.raises(UserError, match="was interrupted") as caught:
            way(killed)
        assert str(aside) in caught.value.what
        assert f"rename {aside} to {killed}" in caught.value.remedy
    os.rename(aside, killed)
    assert without(killed, "img-3")


def test_the_next_export_replaces_it_or_puts_it_back(killed, tmp_path, capsys):
    new = write_model(tmp_path / "new")
    assert cli.main(["export", str(new), "--to", str(killed)]) == 2
    assert "a model already exists here" in capsys.readouterr().err
    assert without(killed, "img-3")
    os.rename(killed, tmp_path / ".served.old")
    assert cli.main(["export", str(tmp_path / "none"), "--to", str(killed), "--force"]) == 2
    assert without(killed, "img-3")
    os.rename(killed, tmp_path / ".served.old")
    assert cli.main(["export", str(new), "--to", str(killed), "--force"]) == 0
    assert not without(killed, "img-3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "served"]


@pytest.mark.parametrize("kind", ["--onnx", "--torch-export"])
def test_force_is_refused_where_it_would_do_nothing(kind, tmp_path, capsys):
    asked = ["export", str(tmp_path / "m"), "--to", str(tmp_path / "graphs"), kind, "--force"]
    assert cli.main(asked) == 2
    assert "name a folder that does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["export", "save_pretrained"])
def test_a_copy_made_during_an_edit_is_of_one_version(way, tmp_path, monkeypatch):
    source, target = write_model(tmp_path / "model"), tmp_path / "copy"
    model, copy = Classifier.open(source, device="cpu"), shutil.copy2
    keys = model.memory.keys(model.memory.live_ids)
    kept = len(keys) - 2
    seen = []

    def edited_after_the_head_was_copied(given, to):
        copy(given, to)
        if given.name == store.HEAD and not seen:
            seen.append(given)
            editing.forget(model, keys[:2])

    monkeypatch.setattr(shutil, "copy2", edited_after_the_head_was_copied)
    if way == "export":
        assert cli.main(["export", str(source), "--to", str(target)]) == 0
    else:
        Classifier.open(source, device="cpu").save_pretrained(target)
    found = Classifier.open(target, device="cpu", verify=True)
    assert seen
    assert len(found.memory) == kept
    assert store.keys_on_disk(found.memory.root) == set(keys[2:])


def test_a_copy_over_an_earlier_one_keeps_nothing_that_was_forgotten(tmp_path):
    model = Classifier.open(write_model(tmp_path / "model"), device="cpu")
    model.save_pretrained(tmp_path / "copy")
    editing.forget(model, ["img-3"])
    model.save_pretrained(tmp_path / "copy")
    copied = Classifier.open(tmp_path / "copy", device="cpu")
    assert "img-3" not in store.keys_on_disk(copied.memory.root)
    with pytest.raises(UserError, match="over itself"):
        model.save_pretrained(model.folder)


def test_an_export_on_a_full_disk_is_an_error_with_a_remedy(tmp_path, monkeypatch, capsys):
    source = write_model(tmp_path / "model")

    def full(given, to):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to))

    monkeypatch.setattr(shutil, "copyfile", full)
    monkeypatch.setattr(shutil, "copy2", full)
    assert cli.main(["export", str(source), "--to", str(tmp_path / "copy")]) == 2
    assert "disk full" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_commands_to_be_copied_are_quoted(tmp_path, capsys):
    source, target = write_model(tmp_path / "model"), tmp_path / "my models" / "it's one"
    assert cli.main(["export", str(source), "--to", str(target)]) == 0
    said = capsys.readouterr().out.splitlines()[-1].removeprefix("predict  ")
    assert shlex.split(said) == ["cnn2gnn", "predict", "--model", str(target), "IMAGE…"]
