"""Other variants of the same stages, each run to the end on two ranks."""

from __future__ import annotations

import json

import numpy as np
import torch
import yaml

from cnn2gnn_dist import settings
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.data.soft_targets import Targets
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from cnn2gnn_dist.stages.shared.networks import Teacher
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support.runs import copy_before, environment, finish, launch, results, scores, start


def run(folder, *overrides: str) -> str:
    code, output = finish(start(launch(folder, *overrides), environment()))
    assert code == 0, output[-4000:]
    return output


def test_batch_scope_needs_no_bank_and_is_evaluated_in_shuffled_order(tmp_path):
    folder = tmp_path / "run"
    networks = ("teacher.arch=whitened_cnn", "teacher.args={widths: [16, 16, 32]}",
                "student.stem=whitened_cnn", "student.stem_args={widths: [16, 32]}")  # fmt: skip
    output = run(
        folder, "graph.scope=batch", "student.epochs=4", "student.control=false", *networks
    )
    assert "graph  " not in output
    table = results(folder)
    assert "graph" not in table["student"]
    assert "control_mlp" not in table
    assert table["student"]["accuracy"] > 0.2
    assert (folder / "report.html").exists()
    first = [
        disk.load_weights(disk.recorded(folder / stage))[name]
        for stage, name in (
            ("teacher", "cnn.first.weight"),
            ("student", "stem.network.first.weight"),
        )
    ]
    assert torch.equal(*first)  # whitened from the same images
    assert torch.equal(first[0][12:], -first[0][:12])


def test_looking_at_held_out_images_does_not_change_the_training(micro_run, tmp_path):
    folder = tmp_path / "run"
    run(folder, "teacher.eval_epochs=1", "student.eval_epochs=1")
    assert scores(folder) == scores(micro_run)
    lines = (folder / "teacher" / "metrics.jsonl").read_text().splitlines()
    looks = [line for line in map(json.loads, lines) if "test_accuracy" in line]
    assert [look["epoch"] for look in looks] == [1, 2]
    assert looks[-1]["test_accuracy"] == results(folder)["teacher"]["accuracy"]


def test_bfloat16_cached_second_hop_streaming_partitioner_and_warm_refreshes(tmp_path):
    folder = tmp_path / "run"
    run(
        folder,
        "precision=bfloat16",
        "graph.sampling.second_hop=cached",
        "graph.partition.partitioner=streaming",
        "graph.search.exact=false",
        "graph.search.recall=0.9",
        "graph.partition.move_gain=2",
        "graph.keep_versions=9",
        "student.epochs=4",
    )
    table = results(folder)
    assert table["student"]["accuracy"] > 0.2
    assert table["run"]["precision"] == {"teacher": "bfloat16", "student": "bfloat16"}
    for stage in ("teacher", "student", "control"):
        state = disk.read_state(disk.recorded(folder / stage))
        assert state["extra"]["precisions"] == [[0, "bfloat16"]]
    notes = [
        json.loads((path / "manifest.json").read_text())["meta"]
        for path in sorted((folder / "student" / "graph").glob("v????"))
    ]
    assert len(notes) >= 2
    assert all(note["search"]["recall"][-1] >= 0.9 for note in notes)
    assert notes[0]["search"]["rebuilt"]
    assert "changed_edges" not in notes[0]["search"]
    assert all(0 <= note["search"]["changed_edges"] <= 1 for note in notes[1:])
    assert all(0 <= note["moved"] <= 1 for note in notes)


def test_zero_3_top_k_dgl_sampler_table_query_and_inverted_lists(micro_run, tmp_path):
    folder = tmp_path / "run"
    copy_before(micro_run, folder, "targets")
    run(
        folder,
        "student.zero_stage=3",
        "targets.top_k=3",
        "graph.sampling.sampler=dgl",
        "graph.sampling.query=table",
        "graph.search.exact=false",
        "graph.partition.parts=4",
        "graph.partition.partitioner=metis",
        "student.max_micro_batch=8",
        "student.neighbour_loss=0.1",
        "student.epochs=4",
    )
    table = results(folder)
    assert table["student"]["accuracy"] > 0.2
    assert len(table["student"]["graph"]["inner"]) == 4

    manifest = Manifest.load(folder / "manifest" / "train.arrow")
    targets = Targets.load(folder / "targets", len(manifest), manifest.num_classes)
    assert targets.indices_VNK.shape == (2, len(manifest), 3)
    rows = targets.lookup(np.arange(len(manifest)), 1)
    np.testing.assert_allclose(np.exp(rows).sum(1), 1.0, rtol=1e-5)

    lines = [json.loads(t) for t in (folder / "student" / "metrics.jsonl").read_text().splitlines()]
    seen = [line for line in lines if "homophily" in line]
    assert seen
    assert all(0 <= line["homophily"] <= 1 for line in seen)
    assert {"loss", "accuracy", "images_per_s", "wait_share", "memory_mb"} <= seen[-1].keys()


def test_soft_targets_are_the_teachers_answers_by_id_and_view(micro_run):
    """Compared with the teacher, loaded without DeepSpeed, on crops read for this test."""
    config = settings.check(yaml.safe_load((micro_run / "config.yaml").read_text()))
    context = Context(config, Ranks(), RunPaths(micro_run), micro_run, "", "cpu", False)
    path = context.paths.train_manifest
    manifest = Manifest.load(path)
    teacher = Teacher(config, manifest.num_classes, initial=False)
    last = disk.all_of(micro_run / "teacher" / "checkpoints")[-1]
    teacher.load_state_dict(disk.load_weights(last))
    teacher.eval()
    targets = Targets.load(context.paths.targets, len(manifest), manifest.num_classes)
    assert targets.views == config.targets.views == 2
    reader = Reader(ReaderSpec(str(path), context.views()))
    ids = np.arange(len(manifest))[::-3].copy()
    answers = []
    for view in range(2):
        batch = reader.read(Request(ids, view))
        with torch.no_grad():
            wanted = teacher(torch.from_numpy(batch.images)).log_softmax(1).numpy()
        np.testing.assert_allclose(targets.lookup(ids, view), wanted, atol=0.02)
        answers.append(wanted)
    assert np.abs(answers[0] - answers[1]).max() > 0.1  # swapped views would be noticed
