"""How keys depend on the fields that name files, or decide which files count."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from cnn2gnn_dist import field_names, settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Entry
from cnn2gnn_dist.pipeline import keys
from cnn2gnn_dist.pipeline.keys import Survey
from cnn2gnn_dist.pipeline.registry import STAGES, stages_of
from cnn2gnn_dist.stages.shared.networks import build_student
from cnn2gnn_dist.training import ds_config
from tests.unit.pipeline.test_keys import Run, folder  # noqa: F401
from tests.unit.pipeline.test_shard_keys import shards  # noqa: F401


def key_of(name: str, *overrides: str) -> str:
    """The key of a stage, all stages before it being the same."""
    config = settings.load("demo", ["run.dir=/nowhere/run", *overrides])
    stage = next(s for s in stages_of(config) if s.name == name)
    parts = keys.parts(config, stage, keys.read_deepspeed(config))
    return keys.key_of(stage, parts, {}) + json.dumps(parts, sort_keys=True)


@pytest.fixture
def ds(tmp_path):
    """A function that writes a DeepSpeed config with changes to the packaged one and returns the override."""
    shipped = json.loads((ds_config.PACKAGE.parent / "ds_config.json").read_text())

    def write(model: str, **fields: object) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({**shipped, **fields}))
        return f"{model}.ds_config={path}"

    return write


@pytest.mark.parametrize(
    "fields",
    [
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}},
        {"steps_per_print": 5, "wall_clock_breakdown": True},
        {"train_batch_size": 256},
        {"gradient_clipping": "auto"},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-8}}},
        {"torch_autocast": {"enabled": "auto", "dtype": "bfloat16"}},
    ],
)
def test_a_deepspeed_config_that_changes_no_result_is_in_no_key(ds, fields):
    for model, stage in (("teacher", "teacher"), ("student", "student"), ("student", "control")):
        assert key_of(stage, ds(model, **fields)) == key_of(stage)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"gradient_clipping": 5.0}, '"gradient_clipping": 5.0'),
        (
            {"optimizer": {"type": "AdamW", "params": {"eps": 1e-3}}},
            '"optimizer.params.eps": 0.001',
        ),
        ({"torch_autocast": {"enabled": False}}, '"torch_autocast.enabled": false'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, '"data_types.grad_accum_dtype": "bf16"'),
    ],
)
def test_a_deepspeed_config_that_changes_results_is_in_its_models_keys(ds, fields, words):
    assert words in key_of("teacher", ds("teacher", **fields))
    assert key_of("student", ds("teacher", **fields)) == key_of("student")
    for stage in ("student", "control"):
        assert words in key_of(stage, ds("student", **fields))


def test_the_ranks_use_the_config_that_was_read_for_them(tmp_path, monkeypatch):
    """Not one in their own working directory."""
    from cnn2gnn_dist.runtime.ranks import Ranks
    from cnn2gnn_dist.stages.shared.context import Context, RunPaths

    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "one" / "ds_config.json").write_text('{"gradient_clipping": 3}')
    (tmp_path / "other" / "ds_config.json").write_text('{"gradient_clipping": 4}')
    monkeypatch.chdir(tmp_path / "one")
    config = settings.load("demo", [f"run.dir={tmp_path}/run"])
    read = keys.read_deepspeed(config)
    monkeypatch.chdir(tmp_path / "other")
    context = Context(
        config, Ranks(), RunPaths(tmp_path), tmp_path, "", "cpu", False, deepspeed=read
    )
    assert context.deepspeed_of("teacher") == context.deepspeed_of("student")
    assert context.deepspeed_of("teacher") == {"gradient_clipping": 3}


def test_weights_count_by_their_content(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"one")
    first = key_of("teacher", f"teacher.weights={path}")
    (tmp_path / "sub").mkdir()
    shutil.copyfile(path, tmp_path / "sub" / "w.pth")
    assert key_of("teacher", f"teacher.weights={tmp_path}/sub/w.pth") == first
    os.utime(path, (1, 1))
    assert key_of("teacher", f"teacher.weights={path}") == first
    path.write_bytes(b"two")
    assert key_of("teacher", f"teacher.weights={path}") != first


def test_weights_that_are_gone_are_those_recorded(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"one")
    config = settings.load("demo", [f"run.dir={tmp_path}/run", f"teacher.weights={path}"])
    stage = next(s for s in stages_of(config) if s.name == "teacher")
    recorded = keys.parts(config, stage, {})
    path.unlink()
    assert keys.parts(config, stage, {}, Entry("", recorded)) == recorded
    assert keys.parts(config, stage, {})["teacher.weights"] == "w.pth is missing"


def test_the_batch_of_evaluate_counts_where_its_images_see_each_other():
    batch, scope = "evaluate.batch=17", "graph.scope=batch"
    assert key_of("evaluate", batch) == key_of("evaluate")
    assert key_of("evaluate", batch, scope) != key_of("evaluate", scope)


def test_the_micro_batch_counts_where_it_is_the_graph():
    micro, scope = "student.max_micro_batch=32", "graph.scope=batch"
    assert key_of("student", micro) == key_of("student")
    assert key_of("student", micro, scope) != key_of("student", scope)
    assert key_of("control", micro, scope) == key_of("control", scope)
    assert keys.DEFAULTS["student.max_micro_batch"] == 256  # such runs stay complete


@pytest.mark.parametrize(
    ("global_batch", "micro", "recorded", "alike"),
    [
        (64, 64, None, True),  # the whole batch, as 256 allows too
        (64, 300, None, True),
        (64, 63, None, False),
        (512, 512, None, False),  # 256 is half of it
        (64, 100, 300, True),  # a record of an earlier version
        (64, 63, 300, False),
        (512, 512, 600, True),
        (512, 256, 600, False),
    ],
)
def test_micro_batches_of_the_whole_batch_are_alike(global_batch, micro, recorded, alike):
    """``recorded``: None: the record has the default."""
    options = ["graph.scope=batch", f"student.global_batch={global_batch}"]
    name, stage = "student.max_micro_batch", STAGES["student"]
    made = parts_with("student", *options) | {name: recorded or 256}
    now = key_with("student", made, *options, f"{name}={micro}")
    assert (now == keys.key_of(stage, made, {})) == alike
    if recorded is None:
        assert key_with("student", None, *options, f"{name}={micro}") == now


def test_a_record_with_a_micro_batch_of_the_whole_batch_shows_a_smaller_one():
    options = ["graph.scope=batch", "student.global_batch=64"]
    made = parts_with("student", *options, "student.max_micro_batch=300")
    before = keys.key_of(STAGES["student"], made, {})
    assert key_with("student", made, *options, "student.max_micro_batch=300") == before
    assert key_with("student", made, *options, "student.max_micro_batch=32") != before


def test_records_from_before_the_micro_batch_counted_stay_valid():
    options = ["graph.scope=batch", "student.max_micro_batch=32"]
    earlier = parts_with("student", *options)
    del earlier["student.max_micro_batch"]
    stage = next(s for s in stages_of(settings.load("demo", [])) if s.name == "student")
    assert key_with("student", earlier, *options) == keys.key_of(stage, earlier, {})
    assert key_with("student", None, *options) != keys.key_of(stage, earlier, {})


def key_with(name: str, recorded: dict | None, *overrides: str) -> str:
    """The key of a stage that has a record with these fields (None: no record)."""
    config = settings.load("demo", ["run.dir=/nowhere/run", *overrides])
    stage = next(s for s in stages_of(config) if s.name == name)
    entry = None if recorded is None else Entry("", recorded)
    return keys.key_of(stage, keys.parts(config, stage, keys.read_deepspeed(config), entry), {})


def parts_with(name: str, *overrides: str) -> dict:
    config = settings.load("demo", ["run.dir=/nowhere/run", *overrides])
    stage = next(s for s in stages_of(config) if s.name == name)
    return keys.parts(config, stage, keys.read_deepspeed(config))


@pytest.mark.parametrize(
    ("stage", "options", "counts"),
    [
        ("index", [], True),
        ("student", [], True),
        ("graph", [], True),
        ("teacher", [], False),
        ("targets", [], False),
        ("control", [], False),
        ("student", ["graph.scope=batch"], False),
        ("student", ["data.source=shards", "data.train=a.tar"], True),
        ("student", ["data.source=shards", "data.train=[a.tar, s3://b/c.tar]"], False),
    ],
)
def test_recorded_checksums_count_where_twins_are_told_by_them(stage, options, counts):
    """Shards behind a URL always have them."""
    known = "data.checksums=true"
    assert (key_with(stage, None, known, *options) != key_with(stage, None, *options)) == counts
    # A record from before they counted stays valid.
    earlier = parts_with(stage, *options)
    earlier.pop("data.checksums", None)
    assert key_with(stage, earlier, known, *options) == key_with(stage, earlier, *options)


def test_a_teacher_that_is_used_as_given_is_not_stale_when_its_training_would_be(tmp_path, ds):
    (tmp_path / "w.pth").write_bytes(b"one")
    given = ["teacher.epochs=0", f"teacher.weights={tmp_path}/w.pth"]
    now = key_with("teacher", None, *given)
    for other in (
        *("teacher.lr=0.5", "teacher.global_batch=6", "teacher.optimizer=sgd", "stream.window=3"),
        *("teacher.head_lr=0", "teacher.early_size=16", ds("teacher", gradient_clipping=5.0)),
    ):
        assert key_with("teacher", None, *given, other) == now, other
        assert key_with("teacher", None, other) != key_with("teacher", None), other
    for other in ("teacher.arch=resnet34", "teacher.args={a: 1}", "views.size=16", "seed=4"):
        assert key_with("teacher", None, *given, other) != now, other


def test_records_of_given_teachers_that_name_their_training_stay_valid(tmp_path, ds):
    (tmp_path / "w.pth").write_bytes(b"one")
    given = ["teacher.epochs=0", f"teacher.weights={tmp_path}/w.pth"]
    more = {"teacher.lr": 0.003, "teacher.momentum": 0.7, "stream.window": 5}
    recorded = {**parts_with("teacher", *given), **more, "teacher.ds_config": {"fp16": 1}}
    made = key_with("teacher", recorded, *given)
    stage = next(s for s in stages_of(settings.load("demo", [])) if s.name == "teacher")
    assert made == keys.key_of(stage, recorded, {})
    assert made == key_with("teacher", recorded, *given, "teacher.lr=0.5")
    assert made != key_with("teacher", recorded, *given, "seed=4")
    # One that was trained is another teacher.
    trained = parts_with("teacher")
    assert key_with("teacher", trained, *given) == key_with("teacher", None, *given)


AUTOCAST_OFF = {"torch_autocast": {"enabled": False, "dtype": "bfloat16"}}


def test_the_precision_of_a_given_teacher_counts_since_it_computes_the_targets(tmp_path, ds):
    (tmp_path / "w.pth").write_bytes(b"one")
    given = ["teacher.epochs=0", f"teacher.weights={tmp_path}/w.pth"]
    off, clips = ds("teacher", **AUTOCAST_OFF), ds("teacher", **AUTOCAST_OFF, gradient_clipping=5.0)
    auto, exact = key_with("teacher", None, *given), key_with("teacher", None, *given, off)
    assert exact != auto
    assert key_with("teacher", None, *given, clips) == exact  # its training still does not count
    fixed = [*given, "precision=float32"]  # which decides, whatever the file says
    assert key_with("teacher", None, *fixed, off) == key_with("teacher", None, *fixed)
    on = ds("teacher", torch_autocast={"enabled": True, "dtype": "bfloat16"})
    assert key_with("teacher", None, *given, on) == auto  # as "auto" is


def test_a_record_of_a_given_teacher_in_another_precision_is_stale(tmp_path, ds):
    """Whether the record names how it would be trained, as earlier ones do, or does not."""
    (tmp_path / "w.pth").write_bytes(b"one")
    given = ["teacher.epochs=0", f"teacher.weights={tmp_path}/w.pth"]
    off = ds("teacher", **AUTOCAST_OFF)
    stage = next(s for s in stages_of(settings.load("demo", [])) if s.name == "teacher")
    for more in ({}, {"teacher.lr": 0.003, "teacher.ds_config": {"gradient_clipping": 5.0}}):
        rounded = {**parts_with("teacher", *given), **more}
        exact = {**rounded, "teacher.ds_config": {"torch_autocast.enabled": False}}
        for recorded, same, other in ((rounded, [], [off]), (exact, [off], [])):
            made = keys.key_of(stage, recorded, {})
            assert key_with("teacher", recorded, *given, *same) == made
            assert key_with("teacher", recorded, *given, *other) != made


def test_a_record_of_a_given_teacher_that_is_older_than_precision_is_read(tmp_path, ds):
    """Such as those of schema 1."""
    (tmp_path / "w.pth").write_bytes(b"one")
    given = ["teacher.epochs=0", f"teacher.weights={tmp_path}/w.pth"]
    off = ds("teacher", **AUTOCAST_OFF)
    recorded = parts_with("teacher", *given)
    del recorded["precision"]
    recorded["teacher.ds_config"] = {"torch_autocast.enabled": False}
    made = keys.key_of(STAGES["teacher"], recorded, {})
    assert key_with("teacher", recorded, *given, off) == made
    assert key_with("teacher", recorded, *given) != made


def test_fields_are_left_out_by_their_whole_path():
    """`batch` or `control` of another section, or an argument of timm's, is a separate field."""
    assert key_of("teacher", "teacher.args={batch: 3, control: 1}") != key_of("teacher")
    for path in keys.EXECUTION:
        assert path in field_names.fields(), path


def test_missing_files_are_an_error_of_the_plan(tmp_path):
    run = Run(tmp_path / "run", "shards", train=f"{tmp_path}/none-*.tar")
    with pytest.raises(UserError, match="no such shard"):
        Survey(run.config).inputs(stages_of(run.config)[0])


def test_the_control_does_not_depend_on_the_graph_that_is_not_in_its_key():
    def initial(*overrides: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return build_student(settings.load("demo", overrides), 10, "none").state_dict()

    one, other = initial(), initial("graph.dim=8", "graph.neighbours=3", "graph.candidates=9")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("source", ["shards", "parquet"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "this is a pipe, not a regular file"),
        ("folder", "this is a folder, not a regular file"),
        ("link", "the file is a link to /nowhere, which can't be accessed: No such file or"),
    ],
)
def test_what_is_no_file_is_refused_before_it_is_opened(shards, capsys, source, kind, message):
    path = shards / ("zz.tar" if source == "shards" else "zz.parquet")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/nowhere")
    run = Run(shards / "run", source, train=shards)
    assert run() == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(path) in said
    assert "name the files with a glob" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("field", "stage", "more"),
    [("student.weights", "student", []), ("targets.logits", "targets", ["targets.views=0"])],
)
def test_other_files_that_a_field_names_count_by_their_content(tmp_path, field, stage, more):
    path = tmp_path / "w"
    path.write_bytes(b"one")
    first = key_of(stage, f"{field}={path}", *more)
    assert first != key_of(stage, *more)
    path.write_bytes(b"other")
    assert key_of(stage, f"{field}={path}", *more) != first
    with pytest.raises(UserError, match="not a") as raised:
        key_of(stage, f"{field}={tmp_path}", *more)
    assert field in raised.value.where


def test_a_stems_file_counts_by_its_content(tmp_path):
    path, stage = tmp_path / "w.pth", "student"
    path.write_bytes(b"one")
    override = f"student.stem_args={{weights: {path}}}"
    first = key_of(stage, override)
    path.write_bytes(b"other")
    assert key_of(stage, override) != first
    # A record from before it counted has no such part, and stays valid.
    config = settings.load("demo", [f"run.dir={tmp_path}/run", override])
    student = next(s for s in stages_of(config) if s.name == stage)
    whole = keys.parts(config, student, {})
    earlier = {name: value for name, value in whole.items() if name != "student.stem_args.weights"}
    assert keys.parts(config, student, {}, Entry("", earlier)) == earlier != whole
    assert keys.parts(config, student, {}, Entry("", whole)) == whole


def test_with_ready_logits_there_is_no_teacher():
    config = settings.load("demo", ["targets.logits=/x", "targets.views=0"])
    assert "teacher" not in [stage.name for stage in stages_of(config)]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teacher.epochs=0"], "has learned nothing"),
        (["targets.logits=/x", "targets.views=2"], "one row per image"),
    ],
)
def test_an_invalid_teacher_is_refused(overrides, says):
    with pytest.raises(UserError, match=says):
        settings.load("demo", overrides)
