"""A result that takes the place of another one has a record of its own: all fields count that count in a new folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnn2gnn_dist import durable, ledger
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.ledger import Entry, Status
from cnn2gnn_dist.pipeline import runner, stage_run
from cnn2gnn_dist.pipeline.keys import Survey, read_deepspeed
from cnn2gnn_dist.pipeline.planning import Step
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.unit.pipeline.test_pipeline import config, make_whole

BEFORE = {"teacher": 2, "student": 4}
"""How many stages come before this one."""


def seen(config: Config, stage: str) -> Step:
    return next(s for s in runner.plan(config) if s.stage.name == stage)


def remake(config: Config, stage: str, *, update: bool = True) -> Entry:
    """Do as `run --update` (or `--force`) with a stage; return its record."""
    survey = Survey(config, read_deepspeed(config))
    step = stage_run.prepare_folder(survey, seen(config, stage), update, force=not update)
    folder = Path(str(config.run.dir)) / stage
    (folder / "output").write_text("made now")
    files = ledger.outputs(folder, [folder / "output"])
    ledger.finish(folder, step.record(digest=str(step.key), outputs=files))
    assert seen(config, stage).status is Status.COMPLETE
    recorded = ledger.finished(folder)
    assert recorded is not None
    return recorded


@pytest.mark.parametrize(
    ("stage", "before", "now"),
    [
        ("student", [], ["graph.scope=batch", "student.max_micro_batch=16"]),
        ("student", [], ["student.stem_args={weights: WEIGHTS}"]),
        ("student", ["graph.scope=batch"], []),  # whose images have no twins
        ("teacher", ["teacher.epochs=0"], ["teacher.epochs=0", "views.size=24"]),
    ],
    ids=["micro_batch", "stem", "checksums", "training"],
)
def test_its_record_is_that_of_a_new_folder(tmp_path, stage, before, now):
    (tmp_path / "w.pth").write_bytes(b"weights")
    before, now = (
        [option.replace("WEIGHTS", f"{tmp_path}/w.pth") for option in options]
        for options in ([*before, "teacher.weights=WEIGHTS"], [*now, "teacher.weights=WEIGHTS"])
    )
    make_whole(config(tmp_path, *before), BEFORE[stage])
    old = seen(config(tmp_path, *before), stage)
    parts = {**old.parts, "teacher.lr": 0.5} if stage == "teacher" else old.parts  # an older record
    folder, record = tmp_path / "run" / stage, Entry("old", parts, inputs=old.inputs)
    ledger.begin(folder, record)
    ledger.finish(folder, record)

    made = remake(config(tmp_path, *now), stage)
    elsewhere = config(tmp_path / "new", *now)
    make_whole(elsewhere, BEFORE[stage])
    new = seen(elsewhere, stage)
    assert made.parts == new.parts
    assert made.key == new.key


def test_the_micro_batch_of_a_remade_student_counts_where_it_is_the_graph(tmp_path):
    make_whole(config(tmp_path), 5)
    remake(config(tmp_path, "graph.scope=batch"), "student")
    other = seen(config(tmp_path, "graph.scope=batch", "student.max_micro_batch=16"), "student")
    assert other.status is Status.STALE
    assert "student.max_micro_batch: 256 -> 16" in other.why


def test_another_stem_in_the_file_of_a_remade_student_is_noticed(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"one")
    make_whole(config(tmp_path), 5)
    given = config(tmp_path, f"student.stem_args={{weights: {path}}}")
    remake(given, "student")
    path.write_bytes(b"other")
    assert seen(given, "student").status is Status.STALE


@pytest.mark.parametrize("how", ["forced", "nothing made yet", "of another key"])
def test_no_other_way_to_a_new_record_takes_over_what_the_old_one_lacks(tmp_path, how):
    batch = ["graph.scope=batch", "student.max_micro_batch=16"]
    make_whole(config(tmp_path), 4)
    folder, step = tmp_path / "run" / "student", seen(config(tmp_path), "student")
    if how == "of another key":  # a training of an earlier release, under --force
        step = seen(config(tmp_path, *batch), "student")
        del step.parts["student.max_micro_batch"]
        key = stage_run.keys.key_of(step.stage, step.parts, step.inputs)
        ledger.begin(folder, Entry(key, step.parts, inputs=step.inputs))
        checkpoint = disk.path_of(disk.root_of(folder), 1)
        checkpoint.mkdir(parents=True)
        durable.write_json(checkpoint / disk.STATE, {"format": disk.FORMAT, "run_id": "other"})
    else:
        ledger.begin(folder, step.record())
    if how == "forced":
        (folder / "output").write_text("made before")

    made = remake(config(tmp_path, *batch), "student", update=how != "forced")
    assert made.parts["student.max_micro_batch"] == 16
    assert (tmp_path / "run" / "student.old-1").exists() == (how == "of another key")
