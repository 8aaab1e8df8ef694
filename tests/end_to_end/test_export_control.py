"""``cnn2gnn export --control``: the control as a model of its own; the cards of both, and of an edited copy."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cnn2gnn_dist
from cnn2gnn_dist import cli, settings
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.stages.shared.networks import build_student
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.end_to_end.test_variants import run
from tests.support import REPOSITORY
from tests.support.runs import results


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with images set apart, whose control was exported to ``control``."""
    folder = tmp_path_factory.mktemp("control") / "run"
    run(folder, "data.calibration=0.1", "teacher.epochs=1")
    assert export(folder, folder.parent / "control", "--control") == 0
    return folder


def export(folder: Path | str, target: Path, *options: str) -> int:
    return cli.main(["export", str(folder), "--to", str(target), *options])


def read(manifest: Path, size: int, ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a manifest, or of these of its images, in the clean view."""
    wanted = np.arange(len(Manifest.load(manifest))) if ids is None else ids
    spec = settings.of_run(manifest.parent.parent).views
    views = ViewSpec(kind="none", size=size, resize=spec.resize, flip=False)
    batch = Reader(ReaderSpec(str(manifest), views)).read(Request(wanted, CLEAN))
    assert batch.valid.all()
    return batch.images, batch.labels


def test_its_answers_are_those_that_were_evaluated(finished: Path) -> None:
    model = cnn2gnn_dist.load(finished.parent / "control", device="cpu")
    assert model.spec.scope == "none"
    assert model.memory is None
    found = np.load(finished / "evaluation" / "control_mlp.npz")
    students = np.load(finished / "evaluation" / "student.npz")
    assert (found["predicted"] != students["predicted"]).any()
    images, labels = read(finished / "manifest" / "test.arrow", 16, found["ids"])
    logits = model.network(images, None).logits.astype(np.float64)
    np.testing.assert_array_equal(logits.argmax(1), found["predicted"])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(shares.max(1), found["confidence"], atol=1e-5)
    answers = model.predict(list(images))
    right = [a.label == model.spec.label_names[y] for a, y in zip(answers, labels, strict=True)]
    accuracy = results(finished)["control_mlp"]["accuracy"]
    assert np.mean(right) == pytest.approx(accuracy)
    assert model.spec.source["accuracy"] == accuracy
    assert not any(answer.neighbours for answer in answers)


def test_it_is_calibrated_on_its_own_outputs(finished: Path) -> None:
    images, labels = read(finished / "manifest" / "calibration.arrow", 16)
    config = settings.of_run(finished)
    network = build_student(config, 10, "none", initial=False).eval()
    network.load_state_dict(disk.load_weights(disk.recorded(finished / "control")))
    with torch.no_grad():
        logits = network(torch.from_numpy(images)).logits_BC.double().numpy()
    kept = np.load(finished.parent / "control" / "calibration.npz")
    order, theirs = (np.lexsort((*np.round(x, 3).T, y)) for x, y in
                     ((logits, labels), (kept["logits"], kept["label"])))  # fmt: skip
    np.testing.assert_array_equal(kept["label"][theirs], labels[order])
    np.testing.assert_allclose(kept["logits"][theirs], logits[order], atol=1e-4)
    fitted = json.loads((finished.parent / "control" / "calibration.json").read_text())
    best = fitted["calibration"]["temperature"]

    def loss(temperature: float) -> float:
        scaled = logits / temperature
        right = scaled[np.arange(len(labels)), labels]
        return float((np.log(np.exp(scaled).sum(1)) - right).mean())

    assert loss(best) <= min(loss(best * 0.97), loss(best * 1.03))


def test_the_cards_show_all_models_that_were_evaluated(finished: Path) -> None:
    table = results(finished)

    def row(label: str, name: str) -> str:
        scores = table[name]
        return f"| {label} | {scores['accuracy']:.2%} | {scores['balanced_accuracy']:.2%} | "

    students = (finished / "model" / "README.md").read_text()
    for label, name in (
        ("teacher (CNN)", "teacher"), ("this model", "student"),
        ("this model without its neighbors", "self_path"), ("the neighbors' vote alone", "vote"),
        ("control: same stem, MLP head, no graph", "control_mlp"),
    ):  # fmt: skip
        assert row(label, name) in students
    controls = (finished.parent / "control" / "README.md").read_text()
    assert controls.count("%") == 2 * 3
    assert row("this model: the control of its run", "control_mlp") in controls
    assert row("student: same stem, with the graph", "student") in controls
    assert row("teacher (CNN)", "teacher") in controls
    assert "an MLP head without a graph" in controls
    assert "memory" not in controls


def test_an_edited_copy_says_that_its_card_is_of_the_export(finished: Path, tmp_path: Path) -> None:
    """And the docs name every file of it."""
    model = cnn2gnn_dist.load(finished / "model", device="cpu")
    model.save_pretrained(tmp_path / "m")
    copy = cnn2gnn_dist.load(tmp_path / "m", device="cpu")
    rng = np.random.default_rng(0)
    noise = list(rng.integers(0, 256, (4, 16, 16, 3), np.uint8))
    editing.add(copy, noise, "noise")
    keys = copy.memory.keys(copy.memory.live_ids)
    editing.relabel(copy, keys[:1], copy.classes_[3])
    editing.remove(copy, keys[1:3])
    assert export(tmp_path / "m", tmp_path / "again") == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "those of the export, before any edit of the memory" in card
    docs = (REPOSITORY / "docs" / "model.md").read_text()
    _, _, table = docs.partition("\n## The folder\n")
    named = set(re.findall(r"`([^`]+)`", table.partition("\n## ")[0]))
    named |= {Path(name).name for name in named}
    there = [p for p in (tmp_path / "again").rglob("*") if p.is_file() and p.name[0] != "."]
    assert {"rows.parquet", "relabelled.npy", "removed.npy"} < {path.name for path in there}
    assert not {path.name for path in there} - named


def test_figures_of_another_control_are_not_shown(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    note = tmp_path / "run" / "evaluation" / "done.json"
    record = json.loads(note.read_text())
    record["inputs"]["control"] = "another"
    note.write_text(json.dumps(record))
    assert export(tmp_path / "run", tmp_path / "m", "--control") == 0
    assert "was not evaluated" in (tmp_path / "m" / "README.md").read_text()
    assert cnn2gnn_dist.load(tmp_path / "m").spec.source["accuracy"] is None


def test_without_a_control_it_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without, target = tmp_path / "run", tmp_path / "m"
    shutil.copytree(finished, without, ignore=shutil.ignore_patterns("control"))
    assert export(without, target, "--control") == 2
    said = capsys.readouterr().err
    assert "this run has trained no control" in said
    assert "student.control=true" in said
    assert export(finished / "model", target, "--control") == 2
    assert "name the folder of the run" in capsys.readouterr().err
    assert export("s3://bucket/run", target, "--control") == 2
    assert "not its control" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [without]
