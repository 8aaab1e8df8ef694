"""Complete runs with the recipe's fields, and with a teacher that was trained elsewhere."""

from __future__ import annotations

import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import cnn2gnn_dist
from cnn2gnn_dist import cli
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.soft_targets import Targets
from cnn2gnn_dist.graph.version import latest_version, open_version
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.end_to_end.test_variants import run
from tests.support.runs import results

RECIPE = [
    *("views.padding=reflect", "views.flip=alternating", "views.cutout=3"),
    *("views.randaugment=1", "views.magnitude=5", "views.hook=timm:rand-m3-n1-mstd0.5-inc1"),
    *("teacher.optimizer=sgd", "teacher.lr=0.1", "teacher.bias_lr=4", "teacher.schedule=triangular"),
    *("teacher.average=lookahead", "teacher.average_decay=0.9", "teacher.average_ramp=3"),
    *("teacher.mixup=0.2", "teacher.cutmix=1"),
    *("student.schedule=one_cycle", "student.average=ema", "student.average_decay=0.9"),
    *("student.stem_lr=0.5", "student.logit_adjust=1", "evaluate.flip=true"),
    *("teacher.early_size=12", "student.early_size=12", "student.early_share=0.5"),
]  # fmt: skip


def test_the_whole_recipe_learns_and_answers_come_from_the_averages(tmp_path):
    folder = tmp_path / "run"
    run(folder, *RECIPE, "teacher.epochs=3", "student.epochs=5", "teacher.zero_stage=3")
    table = results(folder)
    for name in ("teacher", "student", "self_path", "control_mlp"):
        assert table[name]["flip"] is True
        # A teacher of 30 steps on mixed and distorted digits has learned little.
        assert table[name]["accuracy"] > (0.0 if name == "teacher" else 0.2), name
    for stage in ("teacher", "student", "control"):
        tensors = disk.read_tensors(disk.recorded(folder / stage))
        assert {name[:2] for name in tensors} >= {"w/", "a/", "m/", "b/", "c/"}
        assert any(name.startswith("v/") for name in tensors) == (stage != "teacher")
        averages = {n[2:]: t for n, t in tensors.items() if n[:2] == "a/"}
        loaded = disk.load_weights(disk.recorded(folder / stage))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in averages.items())
    lines = (folder / "teacher" / "metrics.jsonl").read_text().splitlines()
    rates = [line["lr"] for line in map(json.loads, lines) if "lr" in line]
    assert max(rates) > 0.09
    assert rates[-1] == pytest.approx(0.007)
    assert "mirror image" in (folder / "model" / "README.md").read_text()


def test_a_teacher_of_another_run_is_used_as_it_is(micro_run, tmp_path):
    file, folder = tmp_path / "teacher.safetensors", tmp_path / "run"
    assert cli.main(["checkpoint", "export", str(micro_run / "teacher"), "--out", str(file)]) == 0
    stem = tmp_path / "stem.safetensors"
    assert cli.main(["checkpoint", "export", str(micro_run / "control"), "--out", str(stem)]) == 0
    run(
        folder,
        *("teacher.epochs=0", f"teacher.weights={file}", f"student.weights={stem}"),
        *("student.epochs=1", "student.stem_lr=0"),
    )
    assert results(folder)["teacher"]["accuracy"] == results(micro_run)["teacher"]["accuracy"]
    for one, other in zip(targets_of(folder), targets_of(micro_run), strict=True):
        np.testing.assert_array_equal(one, other)
    given = load_file(stem)
    for stage in ("student", "control"):
        there = disk.load_weights(disk.recorded(folder / stage))
        frozen = [n for n in there if n.startswith("stem.") and n.endswith(("weight", "bias"))]
        assert frozen
        assert all(torch.equal(there[name], given[name]) for name in frozen)


def targets_of(folder):
    manifest = Manifest.load(folder / "manifest" / "train.arrow")
    found = Targets.load(folder / "targets", len(manifest), manifest.num_classes)
    return found.lookup(np.arange(len(manifest)), 0), found.lookup(np.arange(len(manifest)), 1)


def test_ready_logits_take_the_place_of_a_teacher(micro_run, tmp_path):
    manifest = Manifest.load(micro_run / "manifest" / "train.arrow")
    wanted = targets_of(micro_run)[0]
    keys = [manifest.key(n) for n in range(len(manifest))]
    pq.write_table(pa.table({"key": keys, "logits": wanted.tolist()}), tmp_path / "l.parquet")
    folder = tmp_path / "run"
    output = run(folder, f"targets.logits={tmp_path}/l.parquet", "targets.views=0")
    assert not (folder / "teacher").exists()
    assert "teacher  " not in output
    table = results(folder)
    assert "teacher" not in table
    assert table["student"]["accuracy"] > 0.2
    np.testing.assert_allclose(np.exp(targets_of(folder)[0]), np.exp(wanted), atol=2e-3)
    assert (folder / "report.html").exists()


def test_unlabelled_images_learn_from_soft_targets_and_are_nobodys_neighbours(micro_run, tmp_path):
    """Every second image has lost its label."""
    (tmp_path / "data").mkdir()
    for path in sorted((micro_run / "shards").glob("train-*")):
        if path.suffix != ".tar":
            shutil.copy(path, tmp_path / "data")
            continue
        with tarfile.open(path) as old, tarfile.open(tmp_path / "data" / path.name, "w") as new:
            for member in old.getmembers():
                if int(member.name.partition(".")[0].rpartition("-")[2]) % 2:
                    if not member.name.endswith((".cls", ".json")):
                        new.addfile(member, old.extractfile(member))
                else:
                    new.addfile(member, old.extractfile(member))
    folder = tmp_path / "run"
    run(
        folder,
        *("data.source=shards", f"data.train={tmp_path}/data", "data.unlabelled=true"),
        *("data.calibration=0.1", "teacher.epochs=4"),
    )
    manifest = Manifest.load(folder / "manifest" / "train.arrow")
    unknown = np.flatnonzero(np.asarray(manifest.label_N) < 0)
    assert len(unknown) == 200
    for other in ("test", "calibration"):
        assert (Manifest.load(folder / "manifest" / f"{other}.arrow").label_N >= 0).all()
    table = results(folder)
    assert table["student"]["accuracy"] > 0.2
    version = open_version(latest_version(folder / "graph"))
    candidates = np.asarray(version.candidates)
    assert not np.isin(candidates, unknown).any()
    assert (candidates[unknown] < 0).all()
    targets = Targets.load(folder / "targets", len(manifest), manifest.num_classes)
    assert np.isfinite(targets.lookup(unknown, 0)).all()
    lines = (folder / "student" / "metrics.jsonl").read_text().splitlines()
    seen = [line for line in map(json.loads, lines) if "labelled_accuracy" in line]
    assert seen
    means = [np.mean([line[n] for line in seen]) for n in ("accuracy", "labelled_accuracy")]
    assert means[1] > 1.3 * means[0]  # those without a label, five in eight, never count as right
    model = cnn2gnn_dist.load(folder / "model")
    answer = model.predict(np.zeros((16, 16, 3), np.uint8))
    assert answer.neighbours
    assert model.memory is not None
    assert (np.asarray(model.memory.labels)[model.memory.live] >= 0).all()
    apart = Manifest.load(folder / "manifest" / "calibration.arrow")
    with np.load(model.folder / "calibration.npz") as kept:
        named = dict(zip(kept["key"].tolist(), kept["label"].tolist(), strict=True))
    assert named == dict(zip(apart.keys.to_pylist(), apart.label_N.tolist(), strict=True))
