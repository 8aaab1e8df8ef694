"""``cnn2gnn export``: what a kill between two renames leaves behind, where it is refused, what stays forgotten."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.model import export
from cnn2gnn_dist.commands.model.opening import opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier, load
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory import decisions, store
from cnn2gnn_dist.inference.memory.forgetting import record_forgotten
from cnn2gnn_dist.inference.memory.view import forgotten
from cnn2gnn_dist.inference.scoring import FITTED
from tests.support.models import calibrate, write_model


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
    assert len(load(model.folder, device="cpu").memory) == 39  # nothing of it was removed


def test_a_copy_over_one_whose_removal_was_killed_keeps_nothing_of_it(tmp_path):
    model = Classifier.open(write_model(tmp_path / "model"), device="cpu")
    model.save_pretrained(tmp_path / "copy")
    (
        tmp_path / "copy" / "memory" / store.HEAD
    ).unlink()  # in earlier versions the first file that went
    editing.forget(model, ["img-3"])
    model.save_pretrained(tmp_path / "copy")
    copied = Classifier.open(tmp_path / "copy", device="cpu")
    assert "img-3" not in store.keys_on_disk(copied.memory.root)


@pytest.mark.parametrize("stop_at", range(4))
def test_what_a_killed_removal_left_is_still_known_to_be_a_memory(tmp_path, stop_at, monkeypatch):
    """Also where nothing else of the model is there."""
    model = Classifier.open(write_model(tmp_path / "model"), device="cpu")
    memory = shutil.copytree(model.memory.root, tmp_path / "copy" / "memory")
    decisions.record(memory, [("img-3", "class 1", "img-3")])
    (memory / store.LOCK).unlink()
    calls = iter(range(100))

    def unlink(path, missing_ok=False, real=Path.unlink):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "copy")
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "copy")
    assert not (memory / decisions.FILE).exists()
    assert len(load(tmp_path / "copy", device="cpu").memory) == 40


def test_a_copy_into_a_folder_with_a_memory_of_another_kind_keeps_its_files(tmp_path):
    model = Classifier.open(write_model(tmp_path / "model"), device="cpu")
    notes = tmp_path / "project" / "memory" / "notes"
    notes.mkdir(parents=True)
    (notes / "a.txt").write_text("mine")
    audit = tmp_path / "project" / "audit" / "index.html"
    audit.parent.mkdir()
    audit.write_text("mine")
    editing.forget(model, ["img-3"])
    (notes.parent / "todo.md").write_text("mine, too")
    parts = [tmp_path / "project" / "memory" / name for name in ("segments", "versions")]
    for folder in parts:
        folder.mkdir()
        (folder / "b.txt").write_text("mine")
    model.save_pretrained(tmp_path / "project")
    assert [(folder / "b.txt").read_text() for folder in parts] == ["mine", "mine"]
    assert audit.read_text() == "mine"
    assert (notes / "a.txt").read_text() == "mine"
    assert (notes.parent / "todo.md").read_text() == "mine, too"
    assert len(load(tmp_path / "project", device="cpu").memory) == 39


def test_what_a_killed_edit_left_is_no_content_of_a_model(tmp_path):
    model = Classifier.open(write_model(tmp_path / "model"), device="cpu")
    model.save_pretrained(tmp_path / "copy")
    editing.forget(Classifier.open(tmp_path / "copy", device="cpu"), ["img-3"])
    editing.forget(model, ["img-3"])
    root, rows = model.memory.root, next(model.memory.root.rglob(store.ROWS)).read_bytes()
    for name, data in {"000008.tmp": rows[: len(rows) // 2], "000009.tmp": rows}.items():
        (root / "segments" / name).mkdir()
        (root / "segments" / name / store.ROWS).write_bytes(data)
    keys = {f"img-{n}" for n in range(40) if n != 3}
    assert store.keys_on_disk(root) == keys
    model.save_pretrained(tmp_path / "copy")
    assert store.keys_on_disk(tmp_path / "copy" / "memory") == keys


@pytest.fixture
def forgetful(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a copy of it which has forgotten two images since; the model has removed one of them."""
    model = Classifier.open(write_model(tmp_path / "model"), device="cpu")
    model.save_pretrained(tmp_path / "copy")
    editing.remove(model, ["img-3"])  # and its features are kept for ``undo``
    editing.forget(model, ["img-9"])
    editing.remove(model, ["img-5"])
    editing.forget(Classifier.open(tmp_path / "copy", device="cpu"), ["img-3", "img-5"])
    return tmp_path / "model", tmp_path / "copy"


def listed(folder: Path) -> set[str]:
    lines = (folder / "memory" / store.FORGOTTEN).read_text().splitlines()[1:]
    return {line.partition(",")[0] for line in lines}


def test_what_the_replaced_model_has_forgotten_does_not_come_back(forgetful, capsys):
    model, copy = forgetful
    assert cli.main(["export", str(model), "--to", str(copy), "--force"]) == 0
    found = Classifier.open(copy, device="cpu", verify=True)
    kept = {f"img-{i}" for i in range(40)} - {"img-3", "img-5", "img-9"}
    assert store.keys_on_disk(found.memory.root) == kept
    assert listed(copy) == {"img-3", "img-5", "img-9"}
    assert not any(path.name.startswith(".copy") for path in copy.parent.iterdir())


def test_a_model_without_a_memory_keeps_the_list_for_the_next_one(forgetful, tmp_path):
    model, copy = forgetful
    plain = write_model(tmp_path / "plain", "none", seed=5)
    for source in (plain, model):
        assert cli.main(["export", str(source), "--to", str(copy), "--force"]) == 0
        found = Classifier.open(copy, device="cpu", verify=True)
        assert (found.memory is None) == (source == plain)
        assert {"img-3", "img-5"} <= listed(copy)
    assert "img-5" not in store.keys_on_disk(copy / "memory")


@pytest.mark.parametrize("scope", ["dataset", "none"])
def test_images_that_were_forgotten_under_another_name_do_not_come_back(scope, tmp_path, capsys):
    """Where two shards have the same key, images are named SHARD/KEY: in one of the two models."""
    source = calibrate(write_model(tmp_path / "model", scope)).folder
    with np.load(source / artefact.CALIBRATION) as kept:
        apart = kept["key"].tolist()
    copy = write_model(tmp_path / "copy")
    names = ["train-000/img-5", "train-001/img-6", "train-000/" + apart[4]]
    record_forgotten(copy / "memory", names)
    with pytest.raises(UserError, match="images that the new one still has"):
        Classifier.open(source, device="cpu").save_pretrained(copy)
    assert cli.main(["export", str(source), "--to", str(copy), "--force"]) == 0
    with np.load(copy / artefact.CALIBRATION) as kept:
        assert kept["key"].tolist() == apart[:4] + apart[5:]
    assert set(names) <= listed(copy)
    if scope == "dataset":
        there = {f"img-{i}" for i in range(40) if i != 5}  # img-6 is in another shard here
        assert store.keys_on_disk(copy / "memory") == there


@pytest.mark.parametrize("scope", ["dataset", "none"])
def test_an_image_set_apart_does_not_come_back_either(scope, tmp_path):
    source = calibrate(write_model(tmp_path / "model", scope)).folder
    calibrate(write_model(tmp_path / "copy"))
    with np.load(source / artefact.CALIBRATION) as kept:
        keys = kept["key"].tolist()
    editing.forget(Classifier.open(tmp_path / "copy", device="cpu"), keys[4:6])
    assert cli.main(["export", str(source), "--to", str(tmp_path / "copy"), "--force"]) == 0
    Classifier.open(tmp_path / "copy", device="cpu", verify=True)
    with np.load(tmp_path / "copy" / artefact.CALIBRATION) as kept:
        assert kept["key"].tolist() == keys[:4] + keys[6:]
        assert len(kept["logits"]) == len(keys) - 2
    assert listed(tmp_path / "copy") == set(keys[4:6])


def test_saved_over_a_model_that_has_forgotten_more_is_refused(forgetful, tmp_path, capsys):
    model, copy = forgetful
    before = store.keys_on_disk(copy / "memory")
    with pytest.raises(
        UserError, match="has forgotten 1 images that the new one still has: img-5"
    ) as caught:
        Classifier.open(model, device="cpu").save_pretrained(copy)
    assert store.keys_on_disk(copy / "memory") == before
    remedy = caught.value.remedy.split("`")[1]
    assert cli.main(shlex.split(remedy)[1:]) == 0
    assert "img-5" not in store.keys_on_disk(copy / "memory")
    # Nothing would come back from a model that has none of them; what both have forgotten stays listed.
    editing.forget(Classifier.open(model, device="cpu"), ["img-5"])
    Classifier.open(model, device="cpu").save_pretrained(copy)
    assert listed(copy) == {"img-3", "img-5", "img-9"}
    assert Classifier.open(copy, device="cpu", verify=True).memory.rows == 37


@pytest.mark.parametrize("earlier", [True, False])
def test_an_export_says_if_sets_are_answered_by_an_earlier_rule(earlier, tmp_path, console, capsys):
    folder = calibrate(write_model(tmp_path / "model")).folder
    if earlier:
        kept = json.loads((folder / FITTED).read_text())
        assert kept["together"].pop("shift")
        (folder / FITTED).write_text(json.dumps(kept))
        artefact.write_checksums(folder)
    assert cli.main(["export", str(folder), "--to", str(tmp_path / "copy")]) == 0
    said = capsys.readouterr().err
    assert ("this model has an earlier rule; `cnn2gnn run --update`" in said) == earlier


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


def test_what_is_forgotten_while_the_new_model_is_written_stays_forgotten(tmp_path, monkeypatch):
    target, new = write_model(tmp_path / "served"), write_model(tmp_path / "new")

    def late(*given, real=export._write):
        real(*given)
        editing.forget(Classifier.open(target, device="cpu"), ["img-7"])

    monkeypatch.setattr(export, "_write", late)
    assert cli.main(["export", str(new), "--to", str(target), "--force"]) == 0
    assert without(target, "img-7")
    assert forgotten(target / artefact.MEMORY) == ["img-7"]
