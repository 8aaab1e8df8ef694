"""A run's model that is written anew: what it has forgotten stays forgotten, and other edits are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist import cli, ledger
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier, load
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.stages.shared.context import RunPaths
from tests.support.models import pictures
from tests.support.remedies import cnn2gnn, remedy_of

Made = tuple[Path, list[str]]


@pytest.fixture
def made(micro_run, tmp_path) -> Made:
    """A copy of the run; the command that writes its model if that is not complete."""
    shutil.copytree(micro_run, tmp_path / "run")
    config = ["--config", str(micro_run / "config.yaml"), f"run.dir={tmp_path}/run"]
    return tmp_path / "run", ["model", *config]


def model_of(folder: Path) -> Classifier:
    return load(folder, device="cpu")


def rewritten_with_update(run: Path, command: list[str]) -> str:
    code, said = cnn2gnn([*command, "model.thumbnails=16"])
    assert code == 2, said
    assert "--update" in remedy_of(said)
    code, said = cnn2gnn([*command, "model.thumbnails=16", "--update"])
    assert code == 0, said
    assert (run / "model.old-1" / "memory" / store.HEAD).is_file()
    return said


def moved_aside(run: Path, command: list[str]) -> str:
    os.rename(run / "model", run / "model.old-1")
    code, said = cnn2gnn(command)
    assert code == 0, said
    return said


def damaged(run: Path, command: list[str]) -> str:
    (run / "model" / artefact.WEIGHTS).unlink()
    code, said = cnn2gnn(command)
    assert code == 0, said
    return said


def exported(run: Path, command: list[str]) -> str:
    """A separate model, in which images were forgotten, is replaced by the run's, which has them."""
    shutil.copytree(run / "model", run.parent / "apart")
    shutil.rmtree(run / "model")
    assert cnn2gnn(command)[0] == 0
    assert cli.main(["export", str(run), "--to", str(run.parent / "apart"), "--force"]) == 0
    return ""


def exported_from_the_graph(run: Path, command: list[str]) -> str:
    """The same where the run has no model: it is made from the graph."""
    os.rename(run / "model", run.parent / "apart")
    assert cli.main(["export", str(run), "--to", str(run.parent / "apart"), "--force"]) == 0
    return ""


@pytest.mark.parametrize(
    "way", [rewritten_with_update, moved_aside, damaged, exported, exported_from_the_graph]
)
def test_what_was_forgotten_stays_forgotten(way: Callable[[Path, list[str]], str], made: Made):
    run, command = made
    model = model_of(run)
    keys = model.memory.keys(model.memory.live_ids)
    images = pictures(20, seed=7)
    unseen = [near.key for answer in model.predict(images) for near in answer.neighbours]
    gone = [*dict.fromkeys(unseen)][:7]  # neighbors of these images: their answers change
    editing.forget(model, gone)
    text = (run / "model" / "memory" / store.FORGOTTEN).read_bytes()
    way(run, command)
    folder = run.parent / "apart" if "export" in way.__name__ else run / "model"
    found = Classifier.open(folder, device="cpu", verify=True)
    assert (folder / "memory" / store.FORGOTTEN).read_bytes() == text
    assert store.keys_on_disk(found.memory.root) == set(keys) - set(gone)
    assert found.memory.keys(found.memory.live_ids) == [key for key in keys if key not in gone]
    # The reference is the memory that the images were removed from by an edit.
    ids = np.arange(len(keys) - len(gone))
    np.testing.assert_array_equal(found.memory.candidates(ids), model.memory.candidates(ids))
    np.testing.assert_array_equal(found.memory.x(ids), model.memory.x(ids))
    np.testing.assert_array_equal(found.predict_proba(images), model.predict_proba(images))
    assert f"{len(keys) - len(gone):,} training images" in (folder / "README.md").read_text() or (
        way is exported
    )


def test_a_temporary_model_has_no_forgotten_image(made: Made):
    from cnn2gnn_dist.commands.model.opening import opened

    run, _ = made
    editing.forget(model_of(run), _some(run, 3))
    gone = set(_listed(run / "model"))
    (run / "model" / ledger.DONE).unlink()
    with opened(run, "cpu") as model:
        assert gone.isdisjoint(store.keys_on_disk(model.memory.root))


def test_an_image_set_apart_stays_forgotten(made: Made, tmp_path):
    run, _ = made
    shutil.copy(RunPaths(run).test_manifest, RunPaths(run).calibration_manifest)
    (run / "model" / ledger.DONE).unlink()
    asked = ["export", str(run), "--to", str(tmp_path / "apart"), "--force"]
    assert cli.main(asked) == 0
    before = np.load(tmp_path / "apart" / artefact.CALIBRATION)
    editing.forget(model_of(tmp_path / "apart"), [gone := str(before["key"][5])])
    assert cli.main(asked) == 0
    Classifier.open(tmp_path / "apart", device="cpu", verify=True)
    after = np.load(tmp_path / "apart" / artefact.CALIBRATION)
    for name in ("key", "label", "logits", "near_distance"):
        np.testing.assert_array_equal(after[name], np.delete(before[name], 5, axis=0))
    assert _listed(tmp_path / "apart") == [gone]


def _some(run: Path, count: int) -> list[str]:
    memory = model_of(run).memory
    return memory.keys(memory.live_ids[:count])


def _listed(model: Path) -> list[str]:
    lines = (model / "memory" / store.FORGOTTEN).read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines[1:]]


@pytest.fixture
def edited(made: Made) -> Made:
    """The same, and its memory has one image fewer, two in another class, and one forgotten."""
    run, command = made
    model = model_of(run)
    ids = model.memory.live_ids
    first, second = model.classes_[:2]
    moved = model.memory.keys(ids[model.memory.of_class(second)[ids]][:2])
    others = [key for key in _some(run, 9) if key not in moved]
    editing.relabel(model, moved, first)
    editing.remove(model, others[:1])
    editing.forget(model, others[1:2])
    return run, command


EDITS = "1 image fewer, 2 images in another class"


def test_an_edited_memory_is_not_overwritten_because_a_file_is_missing(edited: Made):
    run, command = edited
    images = len(model_of(run).memory)  # all but one that was forgotten, and one that was removed
    (run / "model" / artefact.CONFIG).unlink()
    before = (run / "model" / "memory" / store.HEAD).read_text()
    for _ in range(2):
        code, said = cnn2gnn(command)
        assert code == 2, said
        assert f"it would lose its edits: {EDITS}" in said
        assert (run / "model" / "memory" / store.HEAD).read_text() == before
        assert (run / "model" / ledger.DONE).is_file()
    code, said = cnn2gnn([*command, "--update"])
    assert code == 0, said
    assert (
        f"the memory of model.old-1 was edited; in comparison with the new one it has {EDITS}"
        in said
    )
    assert len(model_of(run).memory) == images + 1
    assert _listed(run / "model") == _listed(run / "model.old-1")


def test_update_names_the_edits_that_the_new_model_lacks(edited: Made):
    assert f"in comparison with the new one it has {EDITS}" in rewritten_with_update(*edited)


def test_export_names_the_edits_that_it_replaces(edited: Made, tmp_path, console, capsys):
    run, command = edited
    apart = tmp_path / "apart"
    os.rename(run / "model", apart)
    assert cnn2gnn(command)[0] == 0
    assert cli.main(["export", str(run), "--to", str(apart)]) == 2
    assert cli.main(["export", str(run), "--to", str(apart), "--force"]) == 0
    assert f"was edited; in comparison with the new one it had {EDITS}" in capsys.readouterr().err


def test_whoever_edits_the_card_does_not_make_the_model_incomplete(edited: Made):
    run, command = edited
    with open(run / "model" / artefact.CARD, "a", encoding="utf-8") as card:
        card.write("License: MIT\n")
    code, said = cnn2gnn(command)
    assert code == 0, said
    assert "complete, skipped" in said
    assert (run / "model" / artefact.CARD).read_text().endswith("License: MIT\n")


def test_a_list_of_what_was_forgotten_stays_valid_for_the_training(made: Made):
    """Also where it is that of the model, which is moved aside meanwhile."""
    run, command = made
    editing.forget(model_of(run), gone := _some(run, 3))
    listed = run / "model" / "memory" / store.FORGOTTEN
    everything = ["run", *command[1:], f"data.relabel={listed}"]
    code, said = cnn2gnn([*everything, "--update"])
    assert code == 0, said
    assert "3 are left out" in said
    assert _listed(run / "model") == gone
    assert set(gone).isdisjoint(store.keys_on_disk(run / "model" / "memory"))
    code, said = cnn2gnn(everything)
    assert code == 0, said
    assert not (run / "model.old-2").exists()
    parts = json.loads((run / "manifest" / ledger.DONE).read_text())["parts"]
    assert parts["data.relabel"] is not None


def test_a_training_again_on_what_was_forgotten_says_so_and_a_finished_run_stays_finished(
    made: Made,
):
    run, command = made
    everything = ["run", *command[1:]]
    editing.forget(model_of(run), _some(run, 3))
    said = "3 images that the memory of this run's model has forgotten are still trained on"
    code, told = cnn2gnn(everything)
    assert code == 0, told
    assert told.count("complete, skipped") == 9
    assert said not in told
    code, told = cnn2gnn([*everything, "model.thumbnails=16", "--update"])  # trains nothing
    assert code == 0, told
    assert said not in told
    code, told = cnn2gnn(
        ["student", *command[1:], "student.epochs=1", "graph.start_epoch=0", "--update"]
    )
    assert code == 0, told
    assert said in told
    assert (
        f"`cp {run}/model/memory/forgotten.csv {run}-forgotten.csv`, then data.relabel={run}-forgotten.csv"
        in told
    )
