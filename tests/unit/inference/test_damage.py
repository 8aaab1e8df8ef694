"""A model's folder with a changed byte, a truncated file or a path that leads elsewhere: refused, and named."""

import json
import shutil

import numpy as np
import pytest

from cnn2gnn_dist.commands.model.opening import opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier, load
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory import store
from tests.support.models import pictures, write_model


@pytest.fixture
def edited(calibrated):
    model = load(calibrated.folder, device="cpu")
    editing.add(model, list(pictures(4, seed=9)), "class 0")
    editing.remove(model, ["img-1"])
    return model


@pytest.mark.thorough
def test_every_file_that_an_answer_rests_on_is_checked(edited):
    folder, head = edited.folder, edited.memory.version.number
    unused = {artefact.CARD, ".lock"}
    for path in sorted(folder.rglob("*")):
        other_version = path.parent.parent.name == "versions" and path.parent.name != f"{head:06d}"
        if not path.is_file() or path.name in unused or other_version:
            continue
        data = path.read_bytes()
        places = {0} if path.name == "HEAD" else {0, len(data) // 2, len(data) - 1}
        for place in places:
            damaged = bytearray(data)
            damaged[place] ^= 0x55
            path.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                load(folder, device="cpu")
            assert caught.value.remedy, path
        path.write_bytes(data[: len(data) // 2] if path.name != "HEAD" else b"")
        with pytest.raises(UserError):
            load(folder, device="cpu")
        path.write_bytes(data)
    load(folder, device="cpu")


@pytest.mark.parametrize("left", [artefact.WEIGHTS, artefact.CHECKSUMS])
def test_a_model_copied_without_its_config_is_a_damaged_model(tmp_path, left):
    (tmp_path / left).write_bytes(b"{}")
    for ask in (lambda: load(tmp_path, device="cpu"), lambda: opened(tmp_path).__enter__()):
        with pytest.raises(
            UserError, match=f"damaged: it has {left}, but no config.json"
        ) as caught:
            ask()
        assert caught.value.where == str(tmp_path)
        assert "copy it again" in caught.value.remedy


def test_a_models_checksums_may_list_the_runs_records_as_they_once_did(edited):
    path = edited.folder / artefact.CHECKSUMS
    listed = json.loads(path.read_text())
    listed["files"]["begin.json"] = [3, "0" * 64]
    path.write_text(json.dumps(listed))
    load(edited.folder, device="cpu")
    listed["files"]["other.json"] = [3, "0" * 64]
    path.write_text(json.dumps(listed))
    with pytest.raises(UserError, match="it is missing"):
        load(edited.folder, device="cpu")


def test_a_large_memory_is_verified_when_asked(edited, monkeypatch):
    monkeypatch.setattr("cnn2gnn_dist.inference.memory.store.VERIFIED_BYTES", 10)
    path = edited.memory.root / "segments" / "000000" / "z.npy"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    load(edited.folder, device="cpu")
    with pytest.raises(UserError, match="its checksum does not match"):
        Classifier.open(edited.folder, device="cpu", verify=True)
    path.write_bytes(path.read_bytes().replace(b"NUMPY", b"NOPE!"))
    with pytest.raises(UserError, match="memory is damaged") as caught:
        load(edited.folder, device="cpu")
    assert "z.npy" in caught.value.where


@pytest.mark.parametrize(
    "name", [artefact.WEIGHTS, artefact.CONFIG, "memory/segments/000000/x.npy"]
)
def test_a_file_that_may_not_be_read(model, monkeypatch, name):
    def refused(path, *_, opened=open, **__):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *_, **__)

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr("io.open", refused)
    with pytest.raises(UserError, match="Permission denied") as caught:
        load(model.folder, device="cpu")
    assert caught.value.where.endswith(name)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta:x", ""])
def test_devices_that_are_not_there(model, device):
    with pytest.raises(UserError, match="torch has no device"):
        load(model.folder, device=device)


def test_the_card_may_be_edited(model):
    (model.folder / artefact.CARD).write_text("# ours\n\nlonger than before")
    load(model.folder, device="cpu")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("weights", "/etc/passwd"), ("checkpoint_path", "x"), ("pretrained", True)],
)
def test_a_model_loads_no_other_file(model, argument, value):
    path = model.folder / artefact.CONFIG
    tree = json.loads(path.read_text())
    tree["student"] |= {"stem": "resnet18", "stem_args": {argument: value}}
    path.write_text(json.dumps(tree))
    artefact.write_checksums(model.folder)
    with pytest.raises(UserError, match=f"{argument} would load other files"):
        load(model.folder, device="cpu")


@pytest.mark.parametrize(
    "recorded", [{"files": []}, {"files": {}}, [], {"files": {"../x": [1, "a"]}}]
)
def test_checksums_that_list_nothing_or_lead_out(model, recorded):
    path = model.folder / artefact.CHECKSUMS
    if isinstance(recorded, dict) and recorded["files"]:
        recorded = {"files": json.loads(path.read_text())["files"] | recorded["files"]}
    path.write_text(json.dumps(recorded))
    with pytest.raises(UserError, match="the model is damaged"):
        load(model.folder, device="cpu")


@pytest.mark.parametrize("change", [{"segments": [["../../x", 40]]}, {"files": {"../x": [1, "a"]}}])
def test_a_version_does_not_lead_out_of_the_memory(model, change):
    path = model.memory.root / "versions" / "000000" / "version.json"
    tree = json.loads(path.read_text()) | change
    del tree["digest"]
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="memory is damaged: "):
        load(model.folder, device="cpu")


@pytest.mark.parametrize("format", ["abc", None, [1], 1e9])
def test_a_format_that_is_no_number(model, format):
    path = model.folder / artefact.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": format}))
    with pytest.raises(UserError):
        load(model.folder, device="cpu")


def test_versions_from_before_digests_are_read(model):
    path = model.memory.root / "versions" / "000000" / "version.json"
    tree = json.loads(path.read_text())
    del tree["digest"]
    path.write_text(json.dumps(tree))
    np.testing.assert_array_equal(
        load(model.folder, device="cpu").predict_proba(pictures(3)),
        model.predict_proba(pictures(3)),
    )


def test_parts_of_another_model_in_the_same_folder_are_not_taken(written_calibrated, tmp_path):
    """A model saved or uploaded over another, whose calibration and memory stay in the folder."""
    shutil.copytree(written_calibrated, tmp_path / "m")
    Classifier.open(write_model(tmp_path / "plain", "none", seed=5)).save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "calibration.json").is_file()
    over = Classifier.open(tmp_path / "m", device="cpu")
    assert over.scoring.calibration is None
    assert over.memory is None
    alone = Classifier.open(tmp_path / "plain", device="cpu")
    asked = pictures(5, seed=9)
    np.testing.assert_array_equal(over.predict_proba(asked), alone.predict_proba(asked))


def test_undo_to_a_version_that_is_damaged_leaves_the_current_one(edited):
    root, head = edited.memory.root, edited.memory.version.number
    (store.version_folder(root, head - 1) / "version.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        editing.undo(edited)
    assert store.head(root) == head
    assert len(load(edited.folder, device="cpu").memory) == len(edited.memory)
