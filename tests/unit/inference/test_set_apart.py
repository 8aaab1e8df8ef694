"""Images set apart for calibration are forgotten, too."""

import shutil

import numpy as np
import pytest

from cnn2gnn_dist import cli, ledger
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory import edits, set_apart
from cnn2gnn_dist.inference.memory.set_apart import SetApart
from cnn2gnn_dist.inference.memory.view import forgotten
from cnn2gnn_dist.inference.scoring import HeldOut
from tests.support.models import pictures


def columns(folder):
    with np.load(folder / artefact.CALIBRATION) as kept:
        return dict(kept)


def test_edits_that_the_storage_of_the_run_does_not_get_are_warned_of(calibrated, capsys):
    call = ["memory", "remove", str(calibrated.folder)]
    assert cli.main([*call, "img-1"]) == 0
    assert "storage" not in capsys.readouterr().err
    (calibrated.folder / ledger.HELD).write_text(
        '{"config.json": 1}'
    )  # as a run with run.storage leaves it
    assert cli.main([*call, "img-2"]) == 0
    assert "keeps the model without this edit" in capsys.readouterr().err


def test_an_image_set_apart_is_forgotten_at_once(calibrated, capsys):
    folder, before = calibrated.folder, columns(calibrated.folder)
    fitted = (folder / "calibration.json").read_bytes()
    assert cli.main(["memory", "forget", str(folder), "apart-7", "img-3"]) == 0
    assert "1 of them were set apart for calibration" in capsys.readouterr().out
    after = columns(folder)
    stay = np.arange(60) != 7
    assert set(after) == set(before)
    for name, column in before.items():
        np.testing.assert_array_equal(after[name], column[stay])
    for name in ("x", "z", "logits", "self_logits"):
        row = before[name][7].tobytes()
        assert not any(row in f.read_bytes() for f in folder.rglob("*") if f.is_file()), name
    assert forgotten(folder / "memory") == ["apart-7", "img-3"]
    assert (folder / "calibration.json").read_bytes() == fitted
    model = Classifier.open(folder, device="cpu", verify=True)
    assert len(model.memory) == 39
    editing.forget(model, ["apart-8"])
    assert len(model.memory) == 39
    editing.forget(model, ["apart-8"])  # what was forgotten before may be named again
    assert forgotten(folder / "memory") == ["apart-7", "img-3", "apart-8"]


def test_new_classes_are_scored_without_what_is_forgotten(calibrated, tmp_path):
    """In the edit that forgets it, not from the next one on."""
    images = list(255 - pictures(5, seed=70) // 8)
    editing.add(calibrated, images, "pale")
    shutil.copytree(calibrated.folder, tmp_path / "other")
    other = Classifier.open(tmp_path / "other", device="cpu")
    gone = [f"apart-{n}" for n in range(20)]
    editing.forget(calibrated, [*gone, "img-1"])
    SetApart(other.folder).forget(gone)
    assert len(HeldOut.read(other.folder).labels_n) == 40
    editing.remove(other, ["img-1"])
    assert calibrated.memory.new_classes[1].to_json() == other.memory.new_classes[1].to_json()


def test_a_model_without_these_keys_says_so(calibrated):
    folder = calibrated.folder
    kept = columns(folder)
    del kept["key"]
    np.savez(folder / artefact.CALIBRATION, **kept)
    artefact.write_checksums(folder)
    with pytest.raises(
        UserError, match=r"1 of 1 key is not in the memory: apart-7; .* 60 set apart"
    ):
        editing.forget(calibrated, ["apart-7"])
    assert not forgotten(folder / "memory")


def test_a_key_that_nothing_has_is_refused(calibrated):
    before = columns(calibrated.folder)
    with pytest.raises(UserError, match="1 of 1 key is not in the memory: nobody\n"):
        editing.forget(calibrated, ["apart-7", "nobody"])
    assert columns(calibrated.folder).keys() == before.keys()
    assert len(columns(calibrated.folder)["key"]) == 60
    assert not forgotten(calibrated.folder / "memory")


@pytest.mark.parametrize("stop_at", range(6))
def test_a_kill_while_forgetting_leaves_a_valid_model(calibrated, stop_at, monkeypatch):
    """Stop before every replacement of a file: it opens, and the same command completes it."""
    folder = calibrated.folder
    calls = iter(range(100))

    def replace(old, new, real=set_apart.artefact.durable.os.replace):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(set_apart.artefact.durable.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        edits.forget(folder / "memory", ["apart-7"], apart=SetApart(folder))
    monkeypatch.undo()
    model = Classifier.open(folder, device="cpu", verify=True)
    assert "apart-7" in forgotten(folder / "memory") or "apart-7" in columns(folder)["key"]
    editing.forget(model, ["apart-7"])
    assert "apart-7" not in columns(folder)["key"]
    assert forgotten(folder / "memory") == ["apart-7"]
    assert not (folder / artefact.COMING).exists()
    Classifier.open(folder, device="cpu", verify=True)


def test_a_run_does_not_write_a_model_anew_whose_images_were_forgotten(calibrated):
    """Its record of the stage compares the sizes of these files, and editing must not change one."""
    folder = calibrated.folder
    files = [folder / name for name in (artefact.CONFIG, artefact.WEIGHTS, artefact.CHECKSUMS)]
    entry = ledger.Entry("key", {}, outputs=ledger.outputs(folder, files))
    editing.forget(calibrated, [f"apart-{n}" for n in range(55)])
    assert ledger.missing(folder, entry) == ""
    assert len(HeldOut.read(folder).labels_n) == 5


def test_new_classes_are_scored_without_what_alone_was_forgotten_of_those_set_apart(calibrated):
    editing.add(calibrated, list(255 - pictures(5, seed=70) // 8), "pale")
    before = calibrated.memory.new_classes[1].to_json()
    editing.forget(calibrated, [f"apart-{n}" for n in range(40)])
    after = calibrated.memory.new_classes[1].to_json()
    assert after != before
    editing.relabel(calibrated, ["img-3"], calibrated.classes_[calibrated.memory.labels[3]])
    assert calibrated.memory.new_classes[1].to_json() == after


def test_without_any_image_set_apart_no_new_class_can_be_scored(calibrated):
    done = editing.add(calibrated, list(255 - pictures(5, seed=70) // 8), "pale")
    everyone = [f"apart-{n}" for n in range(60)]
    with pytest.raises(UserError, match="can't be scored: pale") as caught:
        editing.forget(calibrated, everyone)
    assert "remove all images of these classes" in caught.value.remedy
    assert len(columns(calibrated.folder)["key"]) == 60
    editing.remove(calibrated, done.keys)
    editing.forget(calibrated, everyone)
    editing.forget(calibrated, ["img-3"])
    assert not len(columns(calibrated.folder)["key"])


def test_a_model_is_opened_while_images_set_apart_are_forgotten(calibrated, monkeypatch):
    folder, listed = calibrated.folder, artefact._listed

    def late(path, real=listed):
        found = real(path)
        if path == folder and waiting:
            waiting.pop()()  # after the listing has been read
        return found

    apart = SetApart(folder)
    waiting = [lambda: apart.forget(["apart-3"])]
    monkeypatch.setattr(artefact, "_listed", late)
    artefact.check_files(folder)
    monkeypatch.undo()
    (folder / artefact.CALIBRATION).write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes"):
        artefact.check_files(folder)
