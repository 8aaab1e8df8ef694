"""Keys change exactly when results do: data, DeepSpeed configs, weights, paths that moved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn2gnn_dist import cli, field_names, settings
from cnn2gnn_dist.data.index import fingerprint
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline import keys, runner
from cnn2gnn_dist.pipeline.keys import Survey
from cnn2gnn_dist.pipeline.registry import stages_of
from cnn2gnn_dist.stages.shared.networks import build_student
from cnn2gnn_dist.training import ds_config
from tests.support import servers
from tests.support.shards import encode_image, make_shards, random_images, write_tar


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of eight images, half of them in a sub-folder."""
    for label, name in enumerate("ab"):
        for number, image in enumerate(random_images(8, 16, 16, seed=label)):
            path = tmp_path / "d" / name / ("sub" if number > 3 else "") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(image))
    return tmp_path / "d"


class Run:
    """A run of the light stages, in this process."""

    def __init__(self, root: Path, source: str, **data: object) -> None:
        self.root = root
        self.overrides = [f"run.dir={root}", f"data.source={source}", "data.holdout=0.25"]
        self.set(**data)

    def set(self, **data: object) -> None:
        """Fields of the section data."""
        named = {f"data.{name}=": value for name, value in data.items()}
        kept = [o for o in self.overrides if not o.startswith(tuple(named))] if named else []
        self.overrides = [*(kept or self.overrides), *(f"{n}{v}" for n, v in named.items())]

    def __call__(self, *more: str) -> int:
        """Pack and index; the exit code."""
        stages = [s.name for s in stages_of(self.config) if s.name in ("pack", "index")]
        codes = [cli.main([name, "--config", "demo", *self.overrides, *more]) for name in stages]
        return max(codes)

    @property
    def config(self):
        return settings.load("demo", self.overrides)

    @property
    def digest(self) -> str:
        """The digest that the teacher's key is built on."""
        return json.loads((self.root / "manifest" / "done.json").read_text())["digest"]

    def status(self, stage: str) -> tuple[Status, str]:
        step = next(s for s in runner.plan(self.config) if s.stage.name == stage)
        return step.status, step.why


def rewrite(path: Path, data: bytes) -> None:
    """Write other bytes of the same length, keeping the old modification time."""
    stat = path.stat()
    assert len(data) == stat.st_size
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))


def flipped(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


# --- folders of images ------------------------------------------------------------------------


def mend(folder: Path) -> None:
    path = folder / "a" / "sub" / "5.png"
    path.write_bytes(flipped(path))  # of equal length


def add(folder: Path) -> None:
    shutil.copy(folder / "a" / "0.png", folder / "a" / "sub" / "new.png")


def drop(folder: Path) -> None:
    (folder / "b" / "sub" / "7.png").unlink()


def swap(folder: Path) -> None:
    (folder / "a" / "1.png").rename(folder / "x.png")
    (folder / "b" / "1.png").rename(folder / "a" / "1.png")
    (folder / "x.png").rename(folder / "b" / "1.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (mend, "data.train: 1 with different contents (a/sub/5.png)"),
        (add, "data.train: 1 added (a/sub/new.png)"),
        (drop, "data.train: 1 removed (b/sub/7.png)"),
        (swap, "data.train: 2 with different contents (a/1.png, …)"),
    ],
)
def test_a_changed_file_of_a_folder_is_named_and_update_reaches_the_teacher(
    folder, tmp_path, capsys, change, words
):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    before, times = run.digest, (folder / "a").stat().st_mtime_ns
    change(folder)
    os.utime(folder / "a", ns=(times, times))  # the folders' times need not tell either
    assert run.status("pack") == (
        Status.STALE,
        f"made from a different config or inputs: {words}",
    )
    for _ in range(2):  # a refusal changes nothing: the next gives the same message
        assert run() == 2
        assert words in capsys.readouterr().err
    assert run("--update") == 0
    assert run.digest != before
    assert run() == 0


def test_touched_and_copied_files_are_the_same_files(folder, tmp_path, capsys):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    before = run.digest
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    assert run.status("pack")[0] is Status.COMPLETE
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    run.set(train=tmp_path / "copy")
    assert run() == 0
    assert "old results" not in capsys.readouterr().err
    assert run.digest == before


def test_packed_images_are_not_needed_any_more(folder, tmp_path, capsys):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    shutil.rmtree(folder)
    assert run() == 0
    assert "there is no such folder" in capsys.readouterr().err
    run.set(train=tmp_path / "elsewhere")  # a path that the run doesn't know is an error
    assert run() == 2


def test_a_disk_that_is_not_mounted_costs_no_shards(folder, tmp_path, capsys):
    """Its mount point exists, but is empty."""
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    shutil.rmtree(folder)
    folder.mkdir()
    for options in ([], ["--update"]):
        assert run(*options) == 0
        assert "had class folders, but has none now" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.old-*"))


def test_contents_are_read_once(folder, tmp_path, monkeypatch):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    read = []
    real = fingerprint._content
    monkeypatch.setattr(fingerprint, "_content", lambda seen: read.append(seen.name) or real(seen))
    assert run() == 0
    assert sorted(read) == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    read.clear()
    os.utime(folder / "a" / "2.png", (1, 1))
    assert run() == 0
    assert set(read) == {"a/2.png"}
    read.clear()
    assert run() == 0
    assert read == []


def test_an_equal_length_and_time_hides_a_change_until_update_reads_again(folder, tmp_path):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    before = run.digest
    rewrite(folder / "a" / "3.png", flipped(folder / "a" / "3.png"))
    assert run("--update") == 0
    assert run.digest != before


def test_which_files_train_and_which_test_is_in_the_key(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "e")
    mend(tmp_path / "e")
    run = Run(tmp_path / "run", "imagefolder", train=folder, test=tmp_path / "e")
    assert run() == 0
    before = run.digest
    run.set(train=tmp_path / "e", test=folder)
    status, why = run.status("pack")
    assert status is Status.STALE
    assert "data.train: 1 with" in why
    assert "data.test: 1 with" in why
    assert run("--update") == 0
    assert run.digest != before


def test_images_behind_links_count_and_what_is_never_packed_does_not(folder, tmp_path):
    (tmp_path / "d2").mkdir()
    (tmp_path / "d2" / "a").symlink_to(folder / "a")
    (folder / "a" / "sub" / "up").symlink_to(folder / "a")
    (folder / "a" / "broken.png").symlink_to("nowhere")
    (folder / "a" / ".hidden").touch()
    (folder / "a" / "notes.txt").write_text("no image")
    seen = fingerprint.list_files(str(tmp_path / "d2"), "imagefolder", ask=False, brief=False)
    found = {s.name: s.bytes for s in seen}
    assert {n: (folder / n).stat().st_size for n in found} == found
    assert set(found) == {f"a/{'sub/' * (i > 3)}{i}.png" for i in range(8)}


def test_of_very_large_sets_the_times_count(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "READ_BYTES", 1)
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    os.utime(folder / "a" / "2.png", (1, 1))
    assert "data.train: 1 with different times (a/2.png)" in run.status("pack")[1]
    assert run("--update") == 0


# --- shards -------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path) -> Path:
    make_shards(tmp_path / "s", random_images(16, 16, 16), np.arange(16) % 2, shard_size=8)
    return tmp_path / "s"


def test_manifests_follow_shards_that_have_moved(shards, tmp_path, capsys):
    run = Run(tmp_path / "run", "shards", train=f"{shards}/*.tar")
    assert run() == 0
    before = run.digest
    shards.rename(tmp_path / "moved")
    run.set(train=f"{tmp_path}/moved/*.tar")
    assert run() == 0
    assert "the shards have moved" in capsys.readouterr().err
    for name in ("train", "test"):
        manifest = Manifest.load(tmp_path / "run" / "manifest" / f"{name}.arrow")
        assert {Path(s.path).parent for s in manifest.shards} == {tmp_path / "moved"}
        manifest.check_shards()
    assert run.status("index")[0] is Status.COMPLETE
    assert run.digest == before
    assert run() == 0
    assert "moved" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_manifests_follow_a_run_that_has_moved_with_its_shards(folder, tmp_path):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    (tmp_path / "run").rename(tmp_path / "other")
    again = Run(tmp_path / "other", "imagefolder", train=folder)
    assert again() == 0
    manifest = Manifest.load(tmp_path / "other" / "manifest" / "train.arrow")
    assert {Path(s.path).parent for s in manifest.shards} == {tmp_path / "other" / "shards"}


@pytest.mark.parametrize("what", ["labels", "images"])
def test_shards_corrected_in_place_at_equal_length(shards, tmp_path, what):
    run = Run(tmp_path / "run", "shards", train=f"{shards}/*.tar")
    assert run() == 0
    before = run.digest
    path = sorted(shards.glob("*.tar"))[0]
    size = path.stat().st_size
    images, labels = random_images(16, 16, 16), np.arange(16) % 2
    if what == "labels":
        make_shards(shards, images, 1 - labels, shard_size=8)
    else:
        path.write_bytes(path.read_bytes().replace(b"IEND", b"IENd"))
    assert path.stat().st_size == size
    status, why = run.status("index")
    assert status is Status.STALE
    assert "data.train: " in why
    assert "shard-000000.tar" in why
    assert run() == 2
    assert run("--update") == 0
    assert run.digest != before


def test_a_remote_shard_that_was_replaced_is_noticed_without_reading_it(tmp_path):
    images = random_images(8, 16, 16)
    make_shards(tmp_path / "s", images, np.arange(8) % 2, shard_size=4)
    with servers.http_server(tmp_path / "s") as served:
        served.tagged = True
        run = Run(tmp_path / "run", "shards", train=f"{served.url}/shard-{{000000..000001}}.tar")
        assert run() == 0
        before, sent = run.digest, served.sent
        assert run() == 0
        path = tmp_path / "s" / "shard-000001.tar"
        path.write_bytes(path.read_bytes().replace(b"IEND", b"IENd"))
        status, why = run.status("index")
        assert status is Status.STALE
        assert "1 with different contents (shard-000001.tar)" in why
        assert served.sent == sent
        assert run() == 2
        assert run("--update") == 0
        assert run.digest != before


def test_of_a_store_without_tags_update_reads_again(tmp_path):
    make_shards(tmp_path / "s", random_images(8, 16, 16), np.arange(8) % 2, shard_size=8)
    with servers.http_server(tmp_path / "s") as served:
        run = Run(tmp_path / "run", "shards", train=f"{served.url}/shard-000000.tar")
        assert run() == 0
        before = run.digest
        assert run("--update") == 0
        assert run.digest == before  # read and found the same: nothing is retrained
        path = tmp_path / "s" / "shard-000000.tar"
        path.write_bytes(path.read_bytes().replace(b"IEND", b"IENd"))
        assert run("--update") == 0
        assert run.digest != before
    assert run() == 0  # missing for a while: reported, and treated as unchanged


def test_names_count_from_what_files_have_in_common(tmp_path):
    for place in ("x/1", "x/2"):
        write_tar(tmp_path / place / "t.tar", [("a.cls", b"0")])
    seen = fingerprint.list_files(
        [f"{tmp_path}/x/1/t.tar", f"{tmp_path}/x/2/t.tar"], "shards", ask=False, brief=False
    )
    assert [s.name for s in seen] == ["1/t.tar", "2/t.tar"]
    assert fingerprint._remote_names(["http://h/d/1/t.tar?sig=a", "s3://b/d/2/t.tar"]) == [
        "1/t.tar",
        "2/t.tar",
    ]


# --- fields that name files ---------------------------------------------------------------------


def key_of(name: str, *overrides: str) -> str:
    """Key of a stage if all stages before it were the same."""
    config = settings.load("demo", ["run.dir=/nowhere/run", *overrides])
    stage = next(s for s in stages_of(config) if s.name == name)
    parts = keys.parts(config, stage, keys.read_deepspeed(config))
    return keys.key_of(stage, parts, {}) + json.dumps(parts, sort_keys=True)


@pytest.fixture
def ds(tmp_path):
    """Writes a DeepSpeed config that deviates from the packaged one; returns the override."""
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
    """Not the one in their own working directory."""
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
    from cnn2gnn_dist.ledger import Entry

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


def test_fields_are_left_out_by_their_whole_path():
    """`batch` or `control` of another section, or an argument of timm's, is a separate field."""
    assert key_of("teacher", "teacher.args={batch: 3, control: 1}") != key_of("teacher")
    for path in keys.EXECUTION:
        assert path in field_names.fields(), path


def test_files_that_lack_are_an_error_of_the_plan(tmp_path):
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


# --- lists of class names beside shards -----------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (["a", "b"], ["b", "a"], "data.train: 1 with different contents (shard-classes.json)"),
        (None, ["a", "b"], "data.train: 1 added (shard-classes.json)"),
        (["a", "b"], None, "data.train: 1 removed (shard-classes.json)"),
    ],
)
def test_lists_of_class_names_beside_shards_count(shards, tmp_path, before, after, words):
    def write(names: list[str] | None) -> None:
        path = shards / "shard-classes.json"
        path.unlink(missing_ok=True)
        if names:
            path.write_text(json.dumps(names))

    write(before)
    run = Run(tmp_path / "run", "shards", train=f"{shards}/*.tar")
    assert run() == 0
    assert run.status("index")[0] is Status.COMPLETE
    write(after)
    status, why = run.status("index")
    assert status is Status.STALE
    assert words in why
    assert run() == 2
    assert run("--update") == 0
    manifest = Manifest.load(tmp_path / "run" / "manifest" / "train.arrow")
    assert manifest.classes == tuple(after or "01")
    assert run() == 0


# --- not files ------------------------------------------------------------------------------


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


def test_with_ready_logits_there_is_no_teacher():
    config = settings.load("demo", ["targets.logits=/x", "targets.views=0"])
    assert "teacher" not in [stage.name for stage in stages_of(config)]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teacher.epochs=0"], "has learned nothing"),
        (["targets.logits=/x", "targets.views=2"], "one row for each image"),
    ],
)
def test_a_teacher_that_is_none_is_refused(overrides, says):
    with pytest.raises(UserError, match=says):
        settings.load("demo", overrides)
