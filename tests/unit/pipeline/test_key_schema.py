"""Keys stay valid as the code changes: added fields, changed defaults, records of an older schema."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from cnn2gnn_dist import cli, field_names, ledger, settings
from cnn2gnn_dist.config import Config, GraphConfig
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline import keys, registry, runner, stage_run
from cnn2gnn_dist.pipeline.key_defaults import DEFAULTS
from cnn2gnn_dist.pipeline.registry import EXECUTION, STAGES
from cnn2gnn_dist.training import ds_config

# --- the table of defaults ----------------------------------------------------------------------

CARRIES = {"name", "device", "run", "stream", "cluster", "checkpoint"} | {
    *("data.train", "data.test"),  # their files count by content
    "data.max_corrupt",
}
"""Fields that are in no key: where and with what a run is computed, and when it gives up."""
CHANGED: dict[str, Any] = {"graph.second_hop": "cached"}
"""Fields whose default differs from the one they were introduced with, and the current default."""
PINNED = {
    "pack": "7d6970805a87cad6a07f",
    "index": "e78b6491afd96b253649",
    "teacher": "e2e64861c8494f9d5a29",
    "targets": "ca03ab0fe66ffc34664b",
    "student": "f71bf4038b2a17be6887",
    "graph": "c56603b819cd440254f2",
    "control": "a71f7c393a2b6bd85958",
    "evaluate": "e9daff4b78fa8f9e9b99",
    "model": "ae7730d2419aab9d3a5f",
}
"""Keys of the preset demo, built on the input x."""

"""Keys of the preset demo, built on the input x."""


def key_fields() -> set[str]:
    """The fields of all keys."""
    return {
        name for stage in STAGES.values() for name in keys._of_stage(stage, field_names.fields())
    }


def test_every_field_is_in_a_key_or_known_not_to_change_results():
    """If this fails for a new field: name the field in a stage of registry.py (a section names all of its
    fields), in registry.EXECUTION, or in CARRIES here."""
    in_keys = key_fields() - EXECUTION
    for name in field_names.fields():
        carries = any(f"{name}.".startswith(f"{one}.") for one in CARRIES)
        counts = name in in_keys
        assert (name in EXECUTION) + carries + counts == (2 if name == "stream.window" else 1), name


def test_every_field_of_a_key_has_a_frozen_default():
    """If this fails for a new field: give it a line in key_defaults.py, which explains what value; or, if no
    value reproduces the previous behavior, name it here: it then makes all finished runs stale."""
    in_every_key: set[str] = set()
    counted = key_fields() - EXECUTION | {"evaluate.batch", "student.max_micro_batch"}
    assert {field_names.original_name(name) for name in counted} - DEFAULTS.keys() == in_every_key


def test_a_default_that_changes_is_changed_knowingly():
    """If this fails for a field: leave its line in key_defaults.py as it is, since that value remains the one
    that counts as absent in keys, and write the current default into CHANGED here. Runs made with the old
    default are stale under the new one, as they should be."""
    today = settings.as_flat(Config()) | {"teacher.ds_config": {}, "student.ds_config": {}}
    for name, value in DEFAULTS.items():
        if field_names.current_name(name) in today:
            assert today[field_names.current_name(name)] == CHANGED.get(name, value), name
    assert CHANGED.keys() <= DEFAULTS.keys()


def test_a_default_is_what_a_config_says_in_json():
    assert json.loads(json.dumps(DEFAULTS)) == DEFAULTS


# --- keys ---------------------------------------------------------------------------------------


def key_of(config: Config, stage: str) -> str:
    return keys.key_of(STAGES[stage], keys.parts(config, STAGES[stage], {}), {"index": "x"})


class Wider(GraphConfig):
    """The section with a field that was added later."""

    twist: int = Field(0, description="new")


class WiderConfig(Config):
    """The config with that section."""

    graph: Wider = Field(default_factory=Wider)


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_field_at_its_default_changes_no_key(stage, monkeypatch):
    monkeypatch.setitem(DEFAULTS, "graph.twist", 0)
    tree = settings.as_tree(settings.load("demo", ["graph.scope=batch", "evaluate.batch=64"]))
    before = key_of(Config.model_validate(tree), stage)
    assert key_of(WiderConfig.model_validate(tree), stage) == before
    tree["graph"]["twist"] = 1
    after = key_of(WiderConfig.model_validate(tree), stage)
    assert (after != before) == (stage in ("student", "graph"))


def test_a_new_field_without_a_line_is_in_the_key():
    tree = settings.as_tree(settings.load("demo"))
    assert key_of(WiderConfig.model_validate(tree), "graph") != key_of(Config(), "graph")


def test_a_default_that_changes_is_in_the_key_from_then_on():
    class Changed(GraphConfig):
        dim: int = Field(90, description="")

    class ChangedConfig(Config):
        graph: Changed = Field(default_factory=Changed)

    assert key_of(ChangedConfig(), "graph") != key_of(Config(), "graph")
    set_to_it = {"graph": {"dim": 64}}
    assert key_of(ChangedConfig.model_validate(set_to_it), "graph") == key_of(Config(), "graph")


@functools.cache
def default_parts(stage: str) -> dict[str, Any]:
    return keys.parts(Config(), STAGES[stage], {})


@pytest.mark.parametrize("field", sorted(key_fields() - EXECUTION))
def test_a_field_away_from_its_default_is_in_the_keys_of_its_stages(field):
    """Every field, whatever its type: the key's fields are changed, not the config."""
    for stage in STAGES.values():
        if keys._of_stage(stage, [field]):
            other = keys.key_of(stage, default_parts(stage.name) | {field: "another"}, {})
            assert other != keys.key_of(stage, default_parts(stage.name), {})
        else:
            assert field not in default_parts(stage.name)


def test_names_are_whole_paths():
    """A field of one section is not that of another, and an argument of timm's is not a field."""
    config = settings.load("demo", ["teacher.args={batch: 3, lr: 1, layers.x: 2}"])
    parts = keys.parts(config, STAGES["teacher"], {})
    assert parts["teacher.args"] == {"batch": 3, "lr": 1, "layers.x": 2}
    assert parts["teacher.lr"] == 0.003
    assert "teacher.args.lr" not in parts
    assert all(name in ("seed", "precision") or "." in name for name in parts)
    named = [f"{section}.batch" for section in ("targets", "evaluate")]
    assert set(named) <= EXECUTION


def test_keys_are_what_they_were():
    """Pinned: a change of these keys would make every finished run stale."""
    config = settings.load("demo", ["data.calibration=0"])  # as the preset was then
    found = {name: key_of(config, name) for name in STAGES}
    assert found == PINNED


def test_a_field_that_has_moved_is_in_keys_by_the_name_that_it_came_in_with():
    assert field_names.moved().items() >= {("graph.exact", "graph.search.exact")}
    assert DEFAULTS.keys() & field_names.moved().values() == set()
    assert field_names.moved().keys() <= DEFAULTS.keys() | EXECUTION
    parts = {"graph.search.exact": False}
    assert keys.key_of(STAGES["graph"], parts, {}) == ledger.key_of(
        "graph", {"graph.exact": False}, {}
    )


def test_a_record_of_before_a_field_moved_is_read(tmp_path):
    """For schema 2 as well as schema 1."""
    config = made(tmp_path, "demo", "graph.search.recall=0.9")
    step = steps_of(config)["student"]
    assert step.why.endswith("graph.search.recall: 0.95 -> 0.9")
    record = step.record()
    old = {field_names.original_name(name): value for name, value in record.parts.items()}
    ledger.finish(tmp_path / "run" / "student", dataclasses.replace(record, parts=old))
    assert steps_of(config)["student"].status is Status.COMPLETE
    today = again(tmp_path, "demo", "graph.search.recall=0.5")
    assert keys.as_made(today, tmp_path / "run", "student").graph == config.graph
    step = steps_of(today)["student"]
    assert step.why.endswith(": graph.search.recall: 0.9 -> 0.5")


def test_another_decoding_makes_stale_what_read_images(tmp_path, monkeypatch):
    config = made(tmp_path, "demo")
    monkeypatch.setitem(registry.VERSIONS, "version.decoding", 2)
    steps = {step.stage.name: step for step in runner.plan(config)}
    assert steps["pack"].status is Status.STALE
    assert steps["pack"].why.endswith("version.decoding: 1 -> 2")
    for stage in ("pack", "index", "teacher", "student", "control"):
        assert "version.decoding" in keys.parts(config, STAGES[stage], {})
        assert key_of(config, stage) != PINNED[stage]


# --- records of schema 1, written by the code of commit 6fa5feb -----------------------------------

RECORDS = json.loads((Path(__file__).parent / "records_of_schema_1.json").read_text())


@pytest.fixture
def versions_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later versions of code that concern the run "other", which has the graph of the mini-batch."""
    monkeypatch.setitem(registry.VERSIONS, "version.neighbours", 1)


def made(tmp_path: Path, name: str, *more: str) -> Config:
    """A run as that code left it, except for the contents of its stages' outputs."""
    (tmp_path / "w.pth").write_bytes(b"one")
    shipped = json.loads((ds_config.PACKAGE.parent / "ds_config.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps({**shipped, "gradient_clipping": 5.0}))
    for folder, entry in RECORDS[name]["done"].items():
        place = tmp_path / "run" / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "done.json").write_text(json.dumps(entry))
        begun = entry | {"digest": "", "outputs": [], "seconds": 0.0}
        (place / "begin.json").write_text(json.dumps(begun))
        for output, size in entry["outputs"]:
            (place / output).write_bytes(b"x" * size)
    (tmp_path / "run" / "config.yaml").touch()
    return again(tmp_path, name, *more)


def again(tmp_path: Path, name: str, *more: str) -> Config:
    overrides = [one.replace("HERE", str(tmp_path)) for one in RECORDS[name]["overrides"]]
    # The preset had no calibration images at that time.
    then = [f"run.dir={tmp_path}/run", "data.calibration=0"]
    return settings.load("demo", [*then, *overrides, *more])


def steps_of(config: Config) -> dict[str, runner.Step]:
    """The stages of such a run; the stage model was added later."""
    return {step.stage.name: step for step in runner.plan(config) if step.stage.name != "model"}


@pytest.mark.usefixtures("versions_then")
@pytest.mark.parametrize("name", RECORDS)
def test_a_run_of_schema_1_is_whole(tmp_path, name):
    steps = steps_of(made(tmp_path, name))
    assert {step.status for step in steps.values()} == {Status.COMPLETE}
    recorded = [entry["key"] for entry in RECORDS[name]["done"].values()]
    assert [step.key for step in steps.values()] == recorded


@pytest.mark.usefixtures("versions_then")
@pytest.mark.parametrize(
    ("name", "override", "stage", "words"),
    [
        ("demo", "data.holdout=0.3", "index", "data.holdout: 0.25 -> 0.3"),
        ("demo", "teacher.lr=0.1", "teacher", "teacher.lr: 0.003 -> 0.1"),
        ("demo", "graph.neighbours=7", "student", "graph.neighbours: 8 -> 7"),
        ("demo", "teacher.args.batch=3", "teacher", "teacher.args.batch: None -> 3"),
        ("other", "teacher.args.batch=4", "teacher", "teacher.args.batch: 3 -> 4"),
        (
            "other",
            "teacher.ds_config=null",
            "teacher",
            "teacher.ds_config.gradient_clipping: 5.0 -> None",
        ),
        ("other", "evaluate.batch=65", "evaluate", "evaluate.batch: 64 -> 65"),
        ("other", "evaluate.batch=256", "evaluate", "evaluate.batch: 64 -> 256"),
    ],
)
def test_a_real_change_of_such_a_run_is_found_and_named(tmp_path, name, override, stage, words):
    step = steps_of(made(tmp_path, name, override))[stage]
    assert step.status is Status.STALE
    assert step.why == f"made from a different config or inputs: {words}"
    assert step.schema == ledger.SCHEMA  # what is recomputed uses the current schema


def test_other_weights_and_other_inputs_of_such_a_run_are_found(tmp_path):
    config = made(tmp_path, "other")
    (tmp_path / "w.pth").write_bytes(b"two")
    step = steps_of(config)["teacher"]
    assert step.status is Status.STALE
    assert "teacher.weights: 'w.pth " in step.why
    (tmp_path / "w.pth").unlink()
    assert steps_of(config)["teacher"].status is Status.COMPLETE  # its record has their digest
    done = tmp_path / "run" / "targets" / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"digest": "another"}))
    step = steps_of(config)["student"]
    assert step.status is Status.STALE
    assert "the stage targets was rerun" in step.why


def test_how_a_result_is_reached_changes_nothing_of_such_a_run(tmp_path):
    config = made(tmp_path, "demo", "run.ranks=4", "teacher.zero_stage=3", "evaluate.batch=17")
    assert {step.status for step in steps_of(config).values()} == {Status.COMPLETE}


@pytest.mark.parametrize(
    ("field", "value"),
    [("key", "0" * 20), ("parts", {"graph": {"neighbours": 8}}), ("parts", {}), ("schema", 7)],
)
def test_a_record_that_does_not_match_its_key_is_not_trusted(tmp_path, field, value):
    config = made(tmp_path, "demo")
    done = tmp_path / "run" / "student" / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {field: value}))
    assert steps_of(config)["student"].status is Status.STALE


def test_a_field_that_schema_1_never_had_makes_its_record_stale_when_set(tmp_path, monkeypatch):
    """As for any record, an absent field counts as being at its default."""
    config = made(tmp_path, "demo")
    monkeypatch.setitem(DEFAULTS, "graph.twist", 0)
    tree = settings.as_tree(config)
    assert steps_of(WiderConfig.model_validate(tree))["student"].status is Status.COMPLETE
    tree["graph"]["twist"] = 1
    step = steps_of(WiderConfig.model_validate(tree))["student"]
    assert step.why == "made from a different config or inputs: graph.twist: 0 -> 1"


def test_a_record_of_before_schema_1_ended_is_stale_as_it_was(tmp_path):
    """A record with fewer fields: what the code did in their place is unknown."""
    config = made(tmp_path, "demo")
    done = tmp_path / "run" / "graph" / "done.json"
    record = json.loads(done.read_text())
    del record["parts"]["graph"]["move_gain"]
    record["key"] = ledger.key_of("graph", record["parts"], record["inputs"], schema=1)
    done.write_text(json.dumps(record))
    assert steps_of(config)["graph"].status is Status.STALE


def test_what_was_begun_under_schema_1_is_ended_under_it(tmp_path):
    """Its checkpoints have that key, and what was built on it has its digest."""
    config = made(tmp_path, "demo")
    (tmp_path / "run" / "teacher" / "done.json").unlink()
    (tmp_path / "run" / "targets" / "output").unlink()
    step = steps_of(config)["teacher"]
    record = RECORDS["demo"]["done"]["teacher"]
    assert (step.status, step.key, step.schema) == (Status.RESUME, record["key"], 1)
    stage_run.prepare_folder(keys.Survey(config), step, update=True, force=False)
    begun = json.loads((tmp_path / "run" / "teacher" / "begin.json").read_text())
    assert begun["schema"] == 1
    assert {k: begun[k] for k in ("key", "parts", "inputs")} == {
        k: record[k] for k in ("key", "parts", "inputs")
    }
    assert steps_of(config)["teacher"].status is Status.RESUME


def test_update_makes_anew_under_todays_schema(tmp_path):
    config = made(tmp_path, "demo", "graph.neighbours=7")
    step = steps_of(config)["student"]
    stage_run.prepare_folder(keys.Survey(config), step, update=True, force=False)
    begun = json.loads((tmp_path / "run" / "student" / "begin.json").read_text())
    assert begun["schema"] == ledger.SCHEMA
    assert begun["parts"]["graph.neighbours"] == 7
    assert steps_of(config)["student"].status is Status.RESUME


def test_a_record_of_a_later_schema_is_named_and_kept(tmp_path, capsys):
    config = made(tmp_path, "demo")
    done = tmp_path / "run" / "teacher" / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"schema": 3}))
    step = steps_of(config)["teacher"]
    assert step.status is Status.STALE
    assert step.why == "recorded by a newer version of cnn2gnn-dist (key schema 3)"
    with pytest.raises(UserError, match="was recorded by a newer version"):
        stage_run.prepare_folder(keys.Survey(config), step, update=False, force=False)
    same = [f"run.dir={tmp_path}/run", "data.calibration=0"]
    assert cli.main(["run", "--config", "demo", *same, "--dry-run"]) == 0
    assert "key schema 3" in capsys.readouterr().out


@pytest.mark.parametrize("schema", [1, 2])
def test_a_model_is_as_it_was_made_whatever_the_config_says_today(tmp_path, schema):
    config = made(tmp_path, "other", *["student.clip=0.5"] * (schema == 2))
    folder = tmp_path / "run" / "student"
    if schema == 2:
        ledger.finish(folder, steps_of(config)["student"].record())
    today = again(tmp_path, "other", "graph.neighbours=2", "student.dim=9", "student.lr=1")
    found = keys.as_made(today, tmp_path / "run", "student")
    assert (found.graph, found.student) == (config.graph, config.student)
    if schema == 2:  # a field added after the record counts as its earlier behavior
        record = json.loads((folder / "done.json").read_text())
        del record["parts"]["graph.search.recall"]
        (folder / "done.json").write_text(json.dumps(record))
        today = again(tmp_path, "other", "graph.search.recall=0.5")
        assert keys.as_made(today, tmp_path / "run", "student").graph.search.recall == 0.95
