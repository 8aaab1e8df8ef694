"""Keys that depend on files of an earlier stage, in a run restored from its storage without these files."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cnn2gnn_dist import ledger, settings
from cnn2gnn_dist.ledger import Entry, Status
from cnn2gnn_dist.pipeline import keys
from cnn2gnn_dist.pipeline.keys import Survey
from cnn2gnn_dist.pipeline.registry import STAGES, Stage
from cnn2gnn_dist.pipeline.stage_run import Run, complete, inspect
from cnn2gnn_dist.pipeline.stored import Stored
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.shared.context import Context
from tests.unit.pipeline.test_key_versions import teacher_of
from tests.unit.run_storage.test_session import URL, opened


def written(context: Context, keys: dict[str, str]) -> list[Path]:
    """Stand-in for the computation of targets, of which only the record counts here."""
    (context.folder / "output").write_text("targets")
    return [context.folder / "output"]


TARGETS = replace(STAGES["targets"], work=written)
STAGES_HERE: list[Stage] = [STAGES["teacher"], TARGETS]


def make_targets(root: Path, *options: str) -> tuple[Status, Status]:
    """Run the stage ``targets`` on a stored run; return its state before, and the next command's view of it."""
    config = settings.load("demo", [f"run.dir={root}", f"run.storage={URL}", *options])
    stored = Stored(config)
    stored.open()
    survey = Survey(config)
    run = Run(survey, stored, Ranks(), "cpu", inside_ray=False, update=True, force=False)
    look = partial(inspect, survey, TARGETS, STAGES_HERE, {"teacher": "digest"}, False)
    before = look()
    stored.after(complete(run, before, STAGES_HERE, {}, look), made=True)
    return before.status, look().status


@pytest.mark.parametrize(
    ("zero_stage", "version"), [(3, 2), (2, None)], ids=["rank_norms", "alike"]
)
def test_targets_made_before_the_teachers_files_came_stay_complete(tmp_path, zero_stage, version):
    """Only its last checkpoint tells whether targets of such a teacher have a version in their key."""
    here, there = tmp_path / "here", tmp_path / "there"
    storage = opened(here)
    teacher_of(here, zero_stage=zero_stage, world_size=2)
    storage.keep_stage("teacher", made=True)

    assert make_targets(there) == (Status.FRESH, Status.COMPLETE)
    recorded = ledger.finished(there / "targets")
    assert recorded is not None
    assert recorded.parts.get("version.rank_norms") == version
    # Stale by another field, and set aside: again without the teacher's files at first.
    third = tmp_path / "third"
    assert make_targets(third, "targets.top_k=3") == (Status.STALE, Status.COMPLETE)


def test_stale_targets_of_an_earlier_release_are_replaced_by_complete_ones(tmp_path):
    """Theirs were recorded without the version: a record that is stale anyway does not decide about the next."""
    here, there = tmp_path / "here", tmp_path / "there"
    storage = opened(here)
    (here / "targets").mkdir()
    config = settings.load("demo", [f"run.dir={here}"])
    parts = keys.parts(config, TARGETS, {})  # there is no teacher yet that would have a version
    assert "version.rank_norms" not in parts
    ledger.finish(here / "targets", Entry("key", parts, inputs={"teacher": "digest"}))
    teacher_of(here, zero_stage=3, world_size=2)
    for stage in STAGES_HERE:
        storage.keep_stage(stage.folder, made=True)

    assert make_targets(there, "targets.top_k=3") == (Status.STALE, Status.COMPLETE)
