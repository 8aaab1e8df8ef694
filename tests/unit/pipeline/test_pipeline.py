"""Keys, skips and refusals, without running any stage."""

from __future__ import annotations

import pytest

from cnn2gnn_dist import cli, consistency, durable, ledger, presets, settings
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.memory import turns
from cnn2gnn_dist.ledger import Entry, Status
from cnn2gnn_dist.pipeline import runner, stage_run
from cnn2gnn_dist.pipeline.keys import Survey, as_made
from cnn2gnn_dist.pipeline.registry import stages_of
from cnn2gnn_dist.stages.shared.context import RunPaths
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support.shards import write_tar


def config(tmp_path, *overrides: str):
    return settings.load("demo", [f"run.dir={tmp_path}/run", *overrides])


def make_whole(config, upto: int) -> None:
    """Mark the first stages as done, under the keys they should have."""
    for _ in range(upto):
        step = next(s for s in runner.plan(config) if s.status is not Status.COMPLETE)
        folder = runner.Path(config.run.dir) / step.stage.folder
        entry = Entry(step.key, step.parts, digest=step.key)
        ledger.begin(folder, entry)
        (folder / "output").write_text(step.stage.name)
        files = ledger.outputs(folder, [folder / "output"])
        ledger.finish(folder, Entry(entry.key, entry.parts, step.key, files, 0.0, step.inputs))


def statuses(config) -> dict[str, Status]:
    return {step.stage.name: step.status for step in runner.plan(config)}


def test_stages_follow_the_config(tmp_path):
    names = [stage.name for stage in stages_of(config(tmp_path))]
    assert names == [
        "pack",
        "index",
        "teacher",
        "targets",
        "student",
        "graph",
        "control",
        "evaluate",
        "model",
    ]
    shards = config(tmp_path, "data.source=shards", "graph.scope=batch", "student.control=false")
    assert [s.name for s in stages_of(shards)] == [
        "index",
        "teacher",
        "targets",
        "student",
        "evaluate",
        "model",
    ]


def test_whole_stages_are_whole_until_a_field_they_depend_on_changes(tmp_path):
    base = config(tmp_path)
    make_whole(base, 9)
    assert set(statuses(base).values()) == {Status.COMPLETE}

    changed = statuses(config(tmp_path, "student.epochs=99"))
    assert changed["teacher"] is changed["targets"] is Status.COMPLETE
    assert changed["student"] is changed["control"] is Status.STALE
    assert changed["graph"] is changed["evaluate"] is Status.FRESH  # they wait for the student

    graph = statuses(config(tmp_path, "graph.neighbours=5"))
    assert graph["control"] is Status.COMPLETE
    assert graph["student"] is Status.STALE


@pytest.mark.parametrize(
    "override",
    [
        "run.ranks=4",
        "device=cpu",
        "stream.backend=local",
        "stream.workers=3",
        "teacher.max_micro_batch=16",
        "teacher.zero_stage=3",
        "checkpoint.every_steps=7",
        "cluster.max_failures=9",
        "evaluate.batch=17",
    ],
)
def test_how_a_result_is_reached_is_not_in_its_key(tmp_path, override):
    make_whole(config(tmp_path), 9)
    assert set(statuses(config(tmp_path, override)).values()) == {Status.COMPLETE}


def test_a_missing_output_is_made_again(tmp_path):
    base = config(tmp_path)
    make_whole(base, 9)
    (tmp_path / "run" / "targets" / "output").unlink()
    assert statuses(base)["targets"] is Status.RESUME


def test_stale_results_are_refused_with_the_changed_fields_then_set_aside(tmp_path):
    base = config(tmp_path)
    make_whole(base, 9)
    changed = config(tmp_path, "student.epochs=99")
    step = next(s for s in runner.plan(changed) if s.stage.name == "student")
    assert "student.epochs: 12 -> 99" in step.why
    root = tmp_path / "run"
    with pytest.raises(UserError, match=r"student\.epochs: 12 -> 99"):
        stage_run.prepare_folder(Survey(changed), step, update=False, force=False)
    assert (root / "student" / "output").exists()
    stage_run.prepare_folder(Survey(changed), step, update=True, force=False)
    assert (root / "student.old-1" / "output").read_text() == "student"
    assert ledger.status(root / "student", step.key)[0] is Status.RESUME


def test_no_edit_of_the_memory_is_under_way_when_a_model_is_set_aside(tmp_path, monkeypatch):
    """It would end in the folder that was renamed, or in the one that takes its place."""
    base, memory = config(tmp_path), tmp_path / "run" / "model" / "memory"
    make_whole(base, 9)
    memory.mkdir()
    (memory / "HEAD").write_text("0\n")
    changed = config(tmp_path, "model.thumbnails=0")
    step = next(s for s in runner.plan(changed) if s.stage.name == "model")
    refused = []

    def set_aside(folder, real=ledger.set_aside):
        with pytest.raises(UserError, match="another process") as caught, turns.editing(memory, 0):
            pass
        refused.append(caught.value)
        return real(folder)

    monkeypatch.setattr(ledger, "set_aside", set_aside)
    stage_run.prepare_folder(Survey(changed), step, update=True, force=False)
    assert refused
    aside = tmp_path / "run" / "model.old-1" / "memory"
    with turns.editing(aside, 0):  # and nothing is held any longer
        assert (aside / "HEAD").exists()


@pytest.mark.parametrize(
    ("options", "finished", "keeps"),
    [
        (["student.lr=0.5"], True, True),
        (["student.lr=0.5", "student.epochs=3"], True, True),
        (["student.lr=0.5", "student.epochs=99"], True, False),  # it goes on
        (["student.lr=0.5"], False, False),
    ],
)
def test_force_says_of_a_finished_training_that_its_weights_stay(
    tmp_path, capsys, console, options, finished, keeps
):
    """Its record then has the new fields: a control with another rate would pass for one trained alike."""
    make_whole(config(tmp_path), 9)
    if not finished:
        (tmp_path / "run" / "control" / ledger.DONE).unlink()
    changed = config(tmp_path, *options)
    control = next(s for s in runner.plan(changed) if s.stage.name == "control")
    stage_run.prepare_folder(Survey(changed), control, update=False, force=True)
    told = "".join(capsys.readouterr())
    assert "resuming anyway" in told
    assert ("no step is trained with what has changed; --update" in told) == keeps


def test_force_takes_the_weights_that_are_given_now(tmp_path):
    """A teacher of 0 epochs is a file's network: an earlier file's checkpoint is no training to resume."""
    for name in ("one.pth", "two.pth"):
        (tmp_path / name).write_bytes(name.encode())
    how = ["teacher.epochs=0", f"teacher.weights={tmp_path}"]
    make_whole(config(tmp_path, *how[:1], f"{how[1]}/one.pth"), 3)
    changed = config(tmp_path, *how[:1], f"{how[1]}/two.pth")
    step = next(s for s in runner.plan(changed) if s.stage.name == "teacher")
    assert step.status is Status.STALE
    with pytest.raises(UserError) as caught:
        stage_run.prepare_folder(Survey(changed), step, update=False, force=False)
    assert "--force" not in caught.value.remedy
    stage_run.prepare_folder(Survey(changed), step, update=False, force=True)
    assert (tmp_path / "run" / "teacher.old-1" / "output").exists()


def test_a_damaged_checkpoint_does_not_keep_an_update_from_resuming(tmp_path):
    """The one before it tells whose they are."""
    made = config(tmp_path)
    make_whole(made, 2)
    step = next(s for s in runner.plan(made) if s.stage.name == "teacher")
    folder = tmp_path / "run" / "teacher"
    ledger.begin(folder, step.record())
    for number, text in ((1, {"format": disk.FORMAT, "run_id": step.key}), (2, None)):
        disk.path_of(disk.root_of(folder), number).mkdir(parents=True)
        if text is not None:
            durable.write_json(disk.path_of(disk.root_of(folder), number) / disk.STATE, text)
    step = next(s for s in runner.plan(made) if s.stage.name == "teacher")
    assert step.status is Status.RESUME
    stage_run.prepare_folder(Survey(made), step, update=True, force=False)
    assert disk.path_of(disk.root_of(folder), 1).is_dir()  # not set aside


def test_a_begun_folder_without_results_may_change_its_config(tmp_path):
    ledger.begin(tmp_path / "stage", Entry("one", {}))
    assert ledger.status(tmp_path / "stage", "two")[0] is Status.FRESH
    (tmp_path / "stage" / "checkpoint").write_text("work")
    assert ledger.status(tmp_path / "stage", "two")[0] is Status.STALE


def test_done_json_cut_off_by_a_kill_counts_as_not_done(tmp_path):
    folder = tmp_path / "stage"
    ledger.begin(folder, Entry("one", {}))
    (folder / "done.json").write_text('{"key": "one", "par')
    assert ledger.status(folder, "one")[0] is Status.RESUME


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with (
        runner._locked(tmp_path / "run"),
        pytest.raises(UserError, match="another process"),
        runner._locked(tmp_path / "run"),
    ):
        pass


def test_unknown_stage_names_the_stages(tmp_path):
    with pytest.raises(UserError, match="no stage 'studnet'") as caught:
        runner.plan(config(tmp_path), ["studnet"])
    assert "student" in str(caught.value)


def test_every_preset_loads_and_describes_itself():
    for name in presets.names():
        loaded = settings.load(name)
        assert loaded.name == name
        assert loaded.graph.partition.parts >= 1
    text = settings.describe()
    assert "student.distill_weight = 0.9" in text
    assert settings.check(settings.as_tree(settings.load("cifar10"))) == settings.load("cifar10")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.ranks=3", "does not divide evenly over 3 ranks"),
        ("run.dir={}/foreign", "is not a run folder"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path, capsys, override, words):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    options = [f"run.dir={tmp_path}/run", override.format(tmp_path)]
    assert cli.main(["run", "--config", "demo", *options, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "teacher    to run" in said.out  # the plan comes first


def test_what_a_stage_waits_for_is_updated_with_it(tmp_path):
    step = next(s for s in runner.plan(config(tmp_path)) if s.stage.name == "teacher")
    for update, command in ((False, "`cnn2gnn run`"), (True, "`cnn2gnn run --update`")):
        with pytest.raises(UserError) as caught:
            stage_run.prepare_folder(Survey(config(tmp_path)), step, update=update, force=False)
        assert caught.value.remedy.endswith(command)


def test_a_folder_is_no_file_of_weights(tmp_path):
    whole = config(tmp_path)
    make_whole(whole, 2)
    with pytest.raises(UserError, match="not a weights file"):
        runner.plan(config(tmp_path, f"teacher.weights={tmp_path}"))


def test_the_config_of_a_run_that_was_moved_is_noted(tmp_path, capsys):
    made = config(tmp_path)
    make_whole(made, 2)
    (tmp_path / "run" / "config.yaml").write_text(settings.as_yaml(made))
    (tmp_path / "run").rename(tmp_path / "moved")
    own = str(tmp_path / "moved" / "config.yaml")
    assert cli.main(["run", "--config", own, "--dry-run"]) == 0
    assert f"to continue that run: run.dir={tmp_path}/moved" in capsys.readouterr().err
    assert cli.main(["run", "--config", own, f"run.dir={tmp_path}/moved", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "note" not in said.err
    assert "index      complete" in said.out


def test_a_limit_of_what_is_not_packed_is_noted(tmp_path):
    limited = config(tmp_path, "data.limit=50")
    assert consistency.notes(limited) == []
    shards = config(tmp_path, "data.limit=50", "data.source=shards", "data.train=x.tar")
    assert "data.limit=50 limits packing" in consistency.notes(shards)[0]


@pytest.mark.parametrize("parts", [{"bygone": {"a": 1}}, {"bygone.a": 1}, {"student": {"a": 1}}])
def test_a_model_made_with_fields_of_another_version_is_refused(tmp_path, parts):
    made = config(tmp_path)
    ledger.begin(tmp_path / "run" / "student", Entry("k", {}))
    ledger.finish(tmp_path / "run" / "student", Entry("k", parts))
    with pytest.raises(UserError, match=r"a\b|bygone"):
        as_made(made, tmp_path / "run", "student")


@pytest.mark.parametrize("indexed_with", [False, True])
def test_checksums_that_come_too_late_are_noted(tmp_path, capsys, indexed_with):
    write_tar(
        tmp_path / "a.tar", [("k0.jpg", b"x"), ("k0.cls", b"0"), ("k1.jpg", b"y"), ("k1.cls", b"1")]
    )
    run = config(tmp_path, "data.checksums=true")
    ledger.claim(runner.Path(str(run.run.dir)), settings.as_yaml(run))
    make_whole(run, 2)
    manifest = RunPaths(runner.Path(str(run.run.dir))).train_manifest
    index([tmp_path / "a.tar"], checksums=indexed_with, progress=False).save(manifest)
    note = runner.checksums_note(run, runner.plan(run))
    assert (note is None) == indexed_with
    assert runner.checksums_note(config(tmp_path), runner.plan(run)) is None
    call = ["run", "--config", "demo", f"run.dir={run.run.dir}", "data.checksums=true", "--dry-run"]
    assert cli.main(call) == 0
    assert ("comes too late" in capsys.readouterr().out) != indexed_with
