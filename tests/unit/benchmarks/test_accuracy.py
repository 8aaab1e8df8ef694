"""The harness of the accuracy table: its arithmetic, cells of one config only, none lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnn2gnn_dist import ledger, settings
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.pipeline import planning, registry
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support.benchmarks import benchmark
from tests.support.shards import make_shards

accuracy = benchmark("accuracy")


def test_cells_of_a_trial_do_not_pass_for_those_of_the_preset(tmp_path: Path) -> None:
    trial = ["teacher.epochs=2", "data.limit=100"]
    accuracy.claim(tmp_path / "cells", "demo", trial)
    accuracy.claim(tmp_path / "cells", "demo", trial)
    with pytest.raises(SystemExit, match=r"another config: .*teacher\.epochs: 2 -> "):
        accuracy.claim(tmp_path / "cells", "demo", [])


def test_further_variants_leave_the_known_cells() -> None:
    known = [
        {"row": "teacher", "seed": 0, "accuracy": 0.1},
        {"row": "batch", "seed": 0, "accuracy": 0.2},
        {"row": "teacher", "seed": 1, "accuracy": 0.3},
    ]
    made = [{"row": "teacher", "seed": 0, "accuracy": 0.4}]
    assert accuracy.merged(known, made) == [*known[1:], *made]


def priced(control: float, teacher: float) -> dict[str, Any]:
    return {"control_mlp": {"flops": control}, "teacher": {"flops": teacher}}


@pytest.mark.parametrize(
    ("teacher_epochs", "views", "student_epochs", "flops", "labelled", "epochs"),
    [
        # An epoch of the control costs 3 of its 10: 30. Teacher: 4 x 3 x 10 = 120, targets 0 passes
        # but the one over clean images: 10. (8 x 30 + 130) / 30 = 12.3.
        (4, 0, 8, (10.0, 10.0), 1.0, 12),
        # Teacher 4 x 3 x 50 = 600, targets 2 x 50 = 100: (8 x 30 + 700) / 30 = 31.3.
        (4, 2, 8, (10.0, 50.0), 1.0, 31),
        # A tenth of the images has a label: the teacher's 600 become 60, the targets are for all.
        # (8 x 30 + 160) / 30 = 13.3.
        (4, 2, 8, (10.0, 50.0), 0.1, 13),
        # A teacher that costs nothing: the same epochs.
        (4, 2, 8, (10.0, 0.0), 1.0, 8),
        # Given weights, no training: (5 x 6 + 3 x 4) / 6 = 7.
        (0, 3, 5, (2.0, 4.0), 1.0, 7),
    ],
)
def test_epochs_at_the_cost_of_teacher_targets_and_control(
    teacher_epochs: int,
    views: int,
    student_epochs: int,
    flops: tuple[float, float],
    labelled: float,
    epochs: int,
) -> None:
    config = settings.load(
        "demo",
        [
            *(f"teacher.epochs={teacher_epochs}", f"targets.views={views}"),
            *(f"student.epochs={student_epochs}", "graph.start_epoch=1"),
            *([] if teacher_epochs else ["teacher.weights=given.safetensors"]),
        ],
    )
    assert accuracy.epochs_at_cost(config, priced(*flops), labelled) == epochs


def run_of(folder: Path, labels: list[int]) -> Path:
    """A run as far as the harness reads it: labels (-1: none), results, a stage that variants share."""
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    found = index(make_shards(folder / "shards", images, [max(one, 0) for one in labels]))
    found = dataclasses.replace(found, label_N=np.array(labels, np.int32))
    found.save(folder / "manifest" / "train.arrow")
    (folder / "results.json").write_text(json.dumps(priced(10.0, 50.0)))
    (folder / "config.yaml").write_text("name: base")
    (folder / "teacher").mkdir()
    (folder / "teacher" / "done.json").write_text('{"seconds": 3}')
    return folder


def test_the_cost_of_a_run_counts_the_teachers_images_only_once(tmp_path: Path) -> None:
    """By hand: teacher 4 x 3 x 50 of two in eight images, targets 2 x 50 of all: (8 x 30 + 250) / 30 = 16.3."""
    options = ["teacher.epochs=4", "targets.views=2", "student.epochs=8"]
    base = run_of(tmp_path / "base", [0, 1] + 6 * [-1])
    assert accuracy.labelled_share(base) == 0.25
    found = accuracy.overrides("labels_at_cost", base, options, "demo")
    assert found == [*accuracy.overrides("labels", base, options, "demo"), "student.epochs=16"]
    assert accuracy.overrides(
        "labels_at_cost", run_of(tmp_path / "all", 4 * [0, 1]), options, "demo"
    )[-1] == ("student.epochs=31")


def test_each_variant_is_the_preset_but_for_what_its_name_says(tmp_path: Path) -> None:
    base, options = run_of(tmp_path / "base", [0, 1]), ["teacher.label_smoothing=0.2"]

    def changed(variant: str) -> set[str]:
        made = accuracy.overrides(variant, base, options, "demo")
        trees = (settings.as_tree(settings.load("demo", options + more)) for more in ([], made))
        return set(settings.differences(*trees))

    smoothing = "student.label_smoothing: 0.0 -> 0.2"
    assert changed("labels") == {"student.distill_weight: 0.9 -> 0.0", smoothing}
    assert changed("logit_adjust") == {"student.logit_adjust: 0.0 -> 1.0"}
    assert changed("batch") == {
        "graph.scope: 'dataset' -> 'batch'",
        "student.control: True -> False",
    }
    epochs = settings.load("demo", []).student.epochs
    assert f"graph.refresh_epochs: 2 -> {epochs}" in changed("built_once")
    first = settings.load("demo", []).graph.sampling.fanouts[0]
    assert changed("fixed_knn") - changed("built_once") == {
        "graph.sampling.query: 'live' -> 'table'",
        f"graph.candidates: 16 -> {first}",
    }


def test_a_variant_shares_the_finished_stages_and_no_others(tmp_path: Path) -> None:
    base, made = run_of(tmp_path / "base", [0, 1]), tmp_path / "made"
    (base / "student").mkdir()
    accuracy.share(base, made)
    accuracy.share(base, made)  # again: nothing is lost
    assert {path.name for path in made.iterdir()} == {
        *("shards", "manifest", "teacher", "config.yaml"),
    }
    for name in ("teacher/done.json", "manifest/train.arrow"):
        assert (made / name).samefile(base / name)
    assert not (made / "config.yaml").samefile(base / "config.yaml")  # which its run rewrites
    (made / "config.yaml").write_text("name: made")
    accuracy.share(base, made)
    assert (made / "config.yaml").read_text() == "name: made"


def test_all_rows_are_wanted_that_are_made() -> None:
    base = {"teacher", "student", "self_path", "vote", "control_mlp"}
    assert accuracy.wanted([]) == base
    assert accuracy.wanted(["batch", "shuffled"]) == base | {
        *("batch", "batch: self path", "shuffled"),
    }
    assert accuracy.wanted(["logit_adjust", "labels_at_cost"]) == base | {
        *("logit_adjust: student", "logit_adjust: self path", "logit_adjust: control"),
        "labels_at_cost: control",
    }


def cell(row: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"row": row, "seed": seed, "accuracy": accuracy, **more}


def test_differences_are_paired_by_seed() -> None:
    """By hand: student minus control is 0.5 and 1.5 points; unpaired it would be anything from -1 to 3."""
    costs = {"parameters": 1234, "flops": 2.5e6, "images_seen": 5000}
    found = [
        cell("control_mlp", 1, 0.820, ms_per_image=0.5, train_seconds=10, **costs),
        cell("student", 0, 0.805, ms_per_image=0.25, ms_alone=2, train_seconds=20, **costs),
        cell("student", 1, 0.835, ms_per_image=0.75, ms_alone=3, train_seconds=41, **costs),
        cell("control_mlp", 0, 0.800, ms_per_image=0.5, ms_alone=1, train_seconds=10, **costs),
        cell("shuffled", 1, 0.5),
    ]
    lines = accuracy.table(found).splitlines()
    assert lines[0].count("|") == lines[1].count("|")
    # Deviations with n - 1: of 80.5 and 83.5 it is 3 / sqrt(2), of 0.5 and 1.5 it is 1 / sqrt(2). A control without
    # time alone, as earlier versions left it, leaves the mean out.
    assert lines[2:] == [
        "| control_mlp | 81.00 ± 1.41 | +0.00 ± 0.00 | 1,234 | 2.5 | 0.500 |  | 10 | 5,000 |",
        "| student | 82.00 ± 2.12 | +1.00 ± 0.71 | 1,234 | 2.5 | 0.500 | 2.500 | 30 | 5,000 |",
        "| shuffled | 50.00 | -32.00 |  |  |  |  |  |  |",
    ]


def trained(folder: Path, stage: str, step: int) -> None:
    """A finished training whose last checkpoint is of that step."""
    final = disk.path_of(folder / stage / "checkpoints", step)
    work = final.with_suffix(".tmp")
    work.mkdir(parents=True)
    disk.publish(work, final, {"format": disk.FORMAT, "step": step}, [])
    outputs = ledger.outputs(folder / stage, list(final.iterdir()))
    ledger.finish(folder / stage, ledger.Entry("key", {}, outputs=outputs, seconds=7.0))


def test_images_seen_are_those_of_the_steps_that_were_made(tmp_path: Path) -> None:
    """Of uneven partitions an epoch of the student has fewer than the control's 93 (48,000 // 512)."""
    found = settings.load("demo", ["teacher.global_batch=256", "student.global_batch=512"])
    (tmp_path / "config.yaml").write_text(settings.as_yaml(found))
    made = {"teacher": 50, "student": 8 * 92, "control": 8 * 93}
    for stage, step in made.items():
        trained(tmp_path, stage, step)
    figures = dict.fromkeys(
        ("accuracy", "balanced_accuracy", "ece", "parameters", "flops", "ms_per_image"), 0.5
    )
    rows = {
        row: accuracy._cell(row, 0, figures, tmp_path, "teacher" if row == "teacher" else None)
        for row in ("teacher", "student", "self_path", "control_mlp")
    }
    seen = {row: cell["images_seen"] for row, cell in rows.items()}
    assert seen == {
        "teacher": 50 * 256,
        "student": 8 * 92 * 512,
        "self_path": 8 * 92 * 512,
        "control_mlp": 8 * 93 * 512,
    }
    assert {cell["train_seconds"] for cell in rows.values()} == {7.0}


def evaluated(folder: Path, options: list[str], until: str = "model") -> Path:
    """A run of the demo whose stages up to one have been recorded as complete, without their files."""
    config = settings.load("demo", [*options, f"run.dir={folder}"])
    ledger.claim(folder, settings.as_yaml(config))
    for _ in planning.plan(config):
        step = next(s for s in planning.plan(config) if s.status is not ledger.Status.COMPLETE)
        ledger.begin(folder / step.stage.folder, step.record())
        ledger.finish(folder / step.stage.folder, step.record(digest=step.key))
        if step.stage.name == until:
            break
    return folder


def test_a_control_at_equal_cost_is_complete_without_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, row = "labels_at_cost", "labels_at_cost: control"
    monkeypatch.setattr(accuracy, "overrides", lambda *_: ["student.epochs=30"])
    base = evaluated(tmp_path / "seed0" / "base", ["seed=0"])
    made = evaluated(base.with_name(variant), ["seed=0", "student.epochs=30"], until="control")
    shutil.rmtree(made / "student")
    known = known_cells(tmp_path, [variant])
    assert known[-1] == cell(row, 0, 0.5, made_by=accuracy.made_by(made, variant))
    assert known[-1]["made_by"] not in (None, accuracy.made_by(base))
    assert accuracy.is_complete(known, tmp_path, "demo", 0, [variant], [])
    shutil.rmtree(made / "control")
    assert not accuracy.is_complete(known, tmp_path, "demo", 0, [variant], [])


def known_cells(folder: Path, variants: list[str]) -> list[dict[str, Any]]:
    base = folder / "seed0" / "base"
    found = [cell(row, 0, 0.5, made_by=accuracy.made_by(base)) for row in accuracy.BASE_ROWS]
    for variant in variants:
        run = base if variant == "shuffled" else base.with_name(variant)
        made_by = accuracy.made_by(run, variant)
        found += [
            cell(name, 0, 0.5, made_by=made_by) for name in accuracy.rows_of(variant).values()
        ]
    return found


def test_cells_are_those_of_runs_that_would_be_made_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["shuffled", "logit_adjust"]
    base = evaluated(tmp_path / "seed0" / "base", ["seed=0"])
    more = accuracy.overrides("logit_adjust", base, ["seed=0"], "demo")
    evaluated(base.with_name("logit_adjust"), ["seed=0", *more])
    known = known_cells(tmp_path, variants)

    def complete(cells: list[dict[str, Any]] = known, seed: int = 0) -> bool:
        found: bool = accuracy.is_complete(cells, tmp_path, "demo", seed, variants, [])
        return found

    assert complete()
    assert not complete(seed=1)
    for left_out in range(len(known)):
        assert not complete(known[:left_out] + known[left_out + 1 :])
        of_others = {**known[left_out], "made_by": "another evaluation"}
        assert not complete([*known[:left_out], of_others, *known[left_out + 1 :]])
    with monkeypatch.context() as changed:
        changed.setattr(accuracy, "SHUFFLED", accuracy.SHUFFLED + 1)
        assert not complete()
    with monkeypatch.context() as changed:
        changed.setitem(registry.VERSIONS, "version.logit_adjust", 99)
        assert not complete()
    assert complete()
    shutil.rmtree(base.with_name("logit_adjust"))
    assert complete()
    assert "logit_adjust is gone" in capsys.readouterr().err
