"""What people type is interpreted as they meant it, or is refused with a remedy that works."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cnn2gnn_dist import cli, consistency, field_names, settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError
from tests.support.examples import examples


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("CNN2GNN_DATA", raising=False)
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("STORE", "/store")
    return str(tmp_path)


def value(config: Config, path: str):
    for name in path.split("."):
        config = getattr(config, name)
    return config


TEXT = [  # as typed, and its meaning; HERE is the working directory
    ("data.train", "*.tar", "HERE/*.tar"),
    ("data.train", "[0-9]*.tar", "HERE/[0-9]*.tar"),
    ("data.train", "[0-9]/[a-z]", "HERE/[0-9]/[a-z]"),
    ("data.train", "{a,b}.tar", "HERE/{a,b}.tar"),
    ("data.train", "{000..003}.tar", "HERE/{000..003}.tar"),
    ("data.train", "@home/x", "HERE/@home/x"),
    ("data.train", "%x", "HERE/%x"),
    ("data.train", "a, b", "HERE/a, b"),
    ("data.train", "/d/{a,$STORE}/x", "/d/{a,/store}/x"),
    ("data.train", "/d/{/a,~/b} (1), ~c", "/d/{/a,~/b} (1), ~c"),
    ("data.train", "[/a/x,/b/y]", ["/a/x", "/b/y"]),
    ("data.train", "[/a/{x,y}.tar, '/b, c', \"/d\"]", ["/a/{x,y}.tar", "/b, c", "/d"]),
    ("data.train", "[/a/[0-9].tar, *.tar]", ["/a/[0-9].tar", "HERE/*.tar"]),
    ("data.train", '["/a/x,/b/y"]', ["/a/x,/b/y"]),
    ("data.train", '"quoted"', "HERE/quoted"),
    ("data.train", "file:///tmp/x%20y", "/tmp/x y"),
    ("data.train", "file://localhost/tmp/x", "/tmp/x"),
    ("data.train", "s3://b/a-{0..3}.tar", "s3://b/a-{0..3}.tar"),
    ("data.train", "s3://b/x%20y", "s3://b/x%20y"),
    ("data.train", "$HOME/x", "/home/ann/x"),
    ("data.train", "${STORE}/x$$1", "/store/x$1"),
    ("data.train", "$CNN2GNN_DATA/x", "HERE/../shared/data/x"),
    ("data.train", "null", None),
    ("data.test", "none", None),
    ("data.train", "./none", "HERE/none"),
    ("run.dir", "~", "/home/ann"),
    ("run.dir", "~/x", "/home/ann/x"),
    ("run.dir", "/x/run #3", "/x/run #3"),
    ("run.dir", "/x/run: two", "/x/run: two"),
    ("run.dir", "/x/ünïcode run", "/x/ünïcode run"),
    ("run.dir", "2024-05-01", "HERE/2024-05-01"),
    ("run.dir", "123", "HERE/123"),
    ("run.dir", "/x/a=b", "/x/a=b"),
    ("run.dir", " /x/y ", "/x/y"),
    ("run.dir", "/x/it's", "/x/it's"),
    ("stream.cache_dir", "~/c", "~/c"),
    ("stream.cache_dir", "c", "HERE/c"),
    *[("name", text, text) for text in ("2024-05-01", "1e3", "0012", "no", "nan", "null", "1_0")],
    *[("data.label_column", text, text) for text in ("y", "no", "on", "0", "1.0", "null", "a: b")],
    ("teacher.arch", "resnet18.a1_in1k", "resnet18.a1_in1k"),
    ("cluster.address", "10.0.0.1:6379", "10.0.0.1:6379"),
    ("seed", "1e3", 1000),
    ("seed", "0012", 12),
    ("stream.cache_bytes", "1e10", 10**10),
    ("student.epochs", "20.0", 20),
    ("student.epochs", '"20"', 20),
    ("teacher.lr", "1e-3", 1e-3),
    ("teacher.lr", ".5", 0.5),
    ("teacher.lr", "1", 1.0),
    ("data.checksums", "yes", True),
    ("data.checksums", "Off", False),
    ("data.checksums", "1", True),
    ("data.limit", "~", None),
    ("data.limit", "none", None),
    ("graph.sampling.fanouts", "[12, 4]", (12, 4)),
    ("graph.sampling.fanouts", "12,4", (12, 4)),
    ("views.scale", "[1e-1, 1]", (0.1, 1.0)),
    (
        "teacher.args",
        "{layers: [1, 1], drop_rate: 1e-1, x: no-one, n: null, b: true, day: 2024-05-01}",
        dict(layers=[1, 1], drop_rate=0.1, x="no-one", n=None, b=True, day="2024-05-01"),
    ),
    ("teacher.args", '{"a": "no", "b": 3}', {"a": "no", "b": 3}),
]


@pytest.mark.parametrize(("path", "typed", "meant"), TEXT)
def test_an_override_is_read_by_the_type_of_its_field(path, typed, meant, here):
    def place(text):
        return os.path.normpath(text.replace("HERE", here)) if "HERE" in text else text

    if isinstance(meant, str):
        meant = place(meant)
    if isinstance(meant, list):
        meant = [place(one) for one in meant]
    config = settings.load("demo", [f"{path}={typed}"])
    found = value(config, path)
    assert found == meant
    assert type(found) is type(meant)
    round_trip(config, here)


def round_trip(config: Config, here: str) -> None:
    text = settings.as_yaml(config)
    with open(f"{here}/again.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    assert settings.load(f"{here}/again.yaml") == config
    assert settings.check(settings.as_tree(config)) == config
    plain = yaml.safe_load(text.replace("$$", "$"))  # any other reader parses it as the same
    assert plain == settings.as_tree(config)


folder_names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12
)


@given(st.lists(folder_names, min_size=5, max_size=5))
@hypothesis_settings(max_examples=examples(75), deadline=None)
def test_any_name_of_a_folder_survives_being_written_and_read(names):
    """Five names a file: a config takes longer to write and read than a name."""
    config = settings.load("demo")
    run = config.run.model_copy(update={"dir": f"/x/{names[0]}y"})
    columns = {"image_column": names[0], "label_column": names[1]}
    train = [f"/x/{name}y" for name in names[1:]]
    data = config.data.model_copy(update=columns | {"train": train})
    config = config.model_copy(update={"run": run, "data": data})
    config = settings.check(settings.as_tree(config))
    text = settings.as_yaml(config)
    with open("again.yaml", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    assert settings.load("again.yaml") == config


REFUSED = [  # override, message, where, a part of the remedy
    ("data.train=", "without a value", "data.train", "data.train=null"),
    ("student.epochs=", "without a value", "student.epochs", "student.epochs="),
    ("data.train=/a/x,/b/y", "several paths", "data.train", "data.train='[/a/x, /b/y]'"),
    ("data.train=/a/x /b/y", "several paths", "data.train", "data.train='[\"/a/x /b/y\"]'"),
    ("data.train=[]", "empty list", "data.train", "data.train"),
    ("data.train=${NOWHERE}/x", "NOWHERE is not set", "data.train", "export NOWHERE"),
    ("run.dir=$EMPTY/x", "EMPTY is empty", "run.dir", "export EMPTY"),
    ("data.train=file://host/x", "another machine", "data.train", "data.train=/"),
    ("run.dir=~nobody-here/x", "no user 'nobody-here'", "run.dir", "run.dir=./~nobody-here/x"),
    ("run.dir=/x/\udcff", "not UTF-8", "run.dir", "UTF-8"),
    ("name=12:30:45", "letters, digits", "name", "config"),
    ("name=..", "letters, digits", "name", "config"),
    ("student.epochs=2.5", "valid integer", "student.epochs", "config"),
    ("student.epochs=12:30", "valid integer", "student.epochs", "config"),
    ("student.epochs=0x10", "valid integer", "student.epochs", "config"),
    ("student.epochs=null", "valid integer", "student.epochs", "config"),
    ("teacher.lr=1,5", "valid number", "teacher.lr", "config"),
    ("data.checksums=2", "valid boolean", "data.checksums", "config"),
    ("student=3", "is a section", "student", "config"),
    ("student.epochs.x=3", "not a section", "student.epochs.x", "student.epochs="),
    ("teacher.args=[1", "not readable", "teacher.args", "brackets"),
    ("teacher.args={a: no}", "ambiguous", "teacher.args.a", "true or false"),
    ("teacher.args={a: 0012}", "ambiguous", "teacher.args.a", "quotes"),
    ("teacher.args={a: 12:30:45}", "ambiguous", "teacher.args.a", "quotes"),
    ("teacher.args={a: 1, a: 2}", "appears twice", "teacher.args.a", "one of them"),
    ("teacher.args={a: !!python/name:os.system x}", "the tag", "teacher.args.a", "leave it out"),
    ("graph.sampling.fanouts=12", "too few", "graph.sampling.fanouts", "config"),
    (
        "graph.sampling.fanouts=[0,0]",
        "2 candidates",
        "graph.sampling.fanouts",
        "graph.sampling.fanouts='[9, 2]'",
    ),
    (
        "graph.sampling.fanouts=[1,6]",
        "2 candidates",
        "graph.sampling.fanouts",
        "graph.sampling.fanouts='[9, 6]'",
    ),
    (
        "graph.sampling.fanouts=[9,1]",
        "2 candidates",
        "graph.sampling.fanouts",
        "graph.sampling.fanouts='[9, 8]'",
    ),
    ("graph.neighbours=16", "k+1st", "graph.neighbours", "graph.neighbours=9"),
    ("student.epochs=nan", "valid integer", "student.epochs", "config"),
    ("views.std=[0, 1, 1]", "above 0", "views.std", "views.std='[0.229"),
    ("views.std=[-1, 1, 1]", "above 0", "views.std", "views.std='[0.229"),
    ("views.std=[58.4, 57.1, 57.4]", "at most 1", "views.std", "255"),
    ("views.mean=[123.7, 116.3, 103.5]", "from 0 to 1", "views.mean", "255"),
    ("views.scale=[1, 0.3]", "not a range", "views.scale", "views.scale='[0.35, 1.0]'"),
    ("views.scale=[0, 1]", "not a range", "views.scale", "views.scale='[0.35, 1.0]'"),
    ("views.scale=[0.3, 2]", "not a range", "views.scale", "views.scale='[0.35, 1.0]'"),
    ("views.ratio=[-1, 1]", "not a range", "views.ratio", "views.ratio='[0.75"),
    ("views.pad=32", "all padding", "views.pad", "views.pad=4"),
]


@pytest.mark.parametrize(("override", "what", "where", "remedy"), REFUSED)
def test_what_can_not_be_meant_is_refused(override, what, where, remedy):
    with pytest.raises(UserError) as caught:
        settings.load("demo", [override])
    error = caught.value
    assert what in error.what
    assert error.where.partition("=")[0] == where
    assert remedy in error.remedy
    assert "\n" not in error.what + error.where + error.remedy
    try:
        error.what.encode()
    except UnicodeEncodeError:
        pytest.fail("a message that can't be printed")


@pytest.mark.parametrize(("override", "remedy"), [(r[0], r[3]) for r in REFUSED if "=" in r[3]])
def test_remedies_that_are_overrides_work_as_written(override, remedy):
    """Each ``field=value`` of a remedy, typed after what was refused, is accepted."""
    with pytest.raises(UserError) as caught:
        settings.load("demo", [override])
    commands = re.findall(r"(?:[a-z_]+\.)+[a-z_]+=(?:'[^']*'|[^\s,;]+)", caught.value.remedy)
    for command in commands:
        for word in shlex.split(command):
            if "VALUE" in word or "/PATH" in word or word.endswith("="):
                continue
            same = word.partition("=")[0] == override.partition("=")[0]
            settings.load("demo", [word] if same else [override, word])
    assert commands


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in field_names.fields()
        for kind in [str(field_names.kind_of(path)[0])]
        if "float" in kind and "tuple" not in kind
    ],
)
def test_no_field_takes_a_number_that_is_not_finite(path):
    for text in ("inf", "-inf", "nan", ".inf", "Infinity", "1e999"):
        with pytest.raises(UserError) as caught:
            settings.load("demo", [f"{path}={text}"])
        assert caught.value.where == path


def test_scopes_and_hops_that_need_no_fanouts_do_not_ask_for_them():
    assert settings.load(
        "demo", ["graph.sampling.second_hop=cached", "graph.sampling.fanouts=[9, 0]"]
    )
    assert settings.load("demo", ["graph.scope=batch", "graph.sampling.fanouts=[1, 1]"])
    assert settings.load("demo", ["graph.scope=batch", "graph.start_epoch=12"])
    with pytest.raises(UserError, match="too few"):
        settings.load("demo", ["graph.scope=batch", "student.max_micro_batch=9"])
    assert settings.load("demo", ["graph.scope=batch", "student.max_micro_batch=10"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["graph.sampling.fanouts=[8,6]"], ["only 7 neighbors"]),
        (["graph.start_epoch=12"], ["never trains with the graph"]),
        (["student.epochs=2", "student.warmup_epochs=2"], ["capped at half", "never trains with"]),
        (["teacher.epochs=1"], ["teacher.warmup_epochs=1 is capped"]),
        (["graph.scope=batch", "graph.start_epoch=12"], ["graph.start_epoch=12"]),
        ([], []),
    ],
)
def test_what_hardly_is_meant_is_noted_and_runs(overrides, said, capsys):
    config = settings.load("demo", overrides)
    notes = consistency.notes(config)
    assert len(notes) == len(said)
    for note, words in zip(notes, said, strict=True):
        assert words in note
        _, remedy, text = note.rpartition(": ")
        if remedy and text.startswith("graph."):  # applying the remedy as written removes the note
            [cured] = shlex.split(text)
            assert note not in consistency.notes(settings.load("demo", [*overrides, cured]))
    assert cli.main(["run", "--config", "demo", "--dry-run", *overrides]) == 0
    assert capsys.readouterr().out.count("note: ") == len(said)


def test_sections_are_added_to_and_mappings_replaced():
    config = settings.load("demo", ["student={epochs: 9, lr: 1e-3}", "teacher.args={a: 1}"])
    assert (config.student.epochs, config.student.lr, config.student.dim) == (9, 0.001, 64)
    assert config.teacher.args == {"a": 1}
    config = settings.load("demo", ["teacher.args.drop_rate=1e-1"])
    assert config.teacher.args == {
        "layers": [1, 1, 1, 1],
        "channels": [16, 32, 64, 128],
        "drop_rate": 0.1,
    }


def test_braces_that_the_shell_has_spelled_out_are_refused():
    """bash makes of data.train=/d/{0..2}.tar three arguments; the last alone is not what was meant."""
    from braceexpand import braceexpand

    for typed in (
        [f"/d/{n}.tar" for n in range(3)],
        [f"/d/train-{n:04d}.tar" for n in range(8, 1024)],
        ["/a.tar", "/b.tar"],
    ):
        with pytest.raises(UserError, match=f"{len(typed)} values") as caught:
            settings.load("demo", [f"data.train={path}" for path in typed])
        (command, _) = shlex.split(caught.value.remedy.replace(", in", " in"))[:2]
        found = settings.load("demo", [command]).data.train
        assert (list(braceexpand(found)) if isinstance(found, str) else found) == typed
    assert settings.load("demo", ["data.train=/d/0.tar"] * 2).data.train == "/d/0.tar"


def test_of_two_overrides_of_a_field_the_last_counts():
    assert settings.load("demo", ["student.epochs=5", "student.epochs=7"]).student.epochs == 7


# Files


def from_file(here: str, text: str | bytes) -> Config:
    with open(f"{here}/c.yaml", "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return settings.load(f"{here}/c.yaml")


FILE = """
name: 0012
seed: 1e3
data: {label_column: no, image_column: 12:30, test: ~, train: [a, "no", $HOME/x]}
run:
  dir: 2024-05-01
teacher: &both
  lr: 1e-3
  global_batch: 1_28
student:
  <<: *both
  epochs: 4
  lr: 2e-3
cluster:
"""


def test_a_file_is_read_by_the_types_of_its_fields(here):
    config = from_file(here, FILE.replace("1_28", "128"))
    assert (config.name, config.seed) == ("0012", 1000)
    assert (config.data.label_column, config.data.image_column) == ("no", "12:30")
    assert config.data.test is None
    assert config.data.train == [f"{here}/a", f"{here}/no", "/home/ann/x"]
    assert config.run.dir == f"{here}/2024-05-01"
    assert (config.teacher.lr, config.student.lr) == (0.001, 0.002)
    assert (config.student.global_batch, config.student.epochs) == (128, 4)
    round_trip(config, here)


def test_a_file_with_a_byte_order_mark_and_a_json_file_are_read(here):
    assert from_file(here, b"\xef\xbb\xbfname: x\n").name == "x"
    assert from_file(here, '{"name": "x", "teacher": {"lr": 1e-3}}').teacher.lr == 0.001


@pytest.mark.parametrize(
    ("text", "what", "line", "remedy"),
    [
        ("student:\n  epochs: 3\nstudent:\n  lr: 0.1\n", "on line 1 and on line 3", 3, "keep one"),
        ("student:\n  epochs: 3\n  epochs: 4\n", "on line 2 and on line 3", 3, "keep one"),
        ("student:\n\tepochs: 3\n", "not readable", 2, "instead of tabs"),
        ("data:\n  train: *.tar\n", "not readable", 2, "quotes"),
        ("data:\n  train: @x\n", "not readable", 2, "quotes"),
        ("run:\n  dir: /x: y\n", "not readable", 2, "quotes"),
        ("data:\n  train: /a,/b\n", "several paths", 2, "data.train='[/a, /b]'"),
        ("teacher:\n  args: {x: on}\n", "ambiguous", 2, "true or false"),
        ("teacher:\n  args: &a {x: *a}\n", "contains itself", 2, "write"),
        ("name: !!python/name:os.system x\n", "the tag", 1, "leave"),
        ("- a\n- b\n", "a mapping of sections", None, "cnn2gnn config"),
        ("just text\n", "a mapping of sections", None, "cnn2gnn config"),
        ("", "is empty", None, "cnn2gnn config"),
        ("# nothing\n", "is empty", None, "cnn2gnn config"),
        (b"name: \xff\n", "not readable", None, "UTF-8"),
        (b"\xff\xfen\x00a\x00", "not readable", None, "UTF-8"),
        ("name: a\x00b\n", "not readable", None, "UTF-8"),
    ],
)
def test_a_broken_file_is_refused_with_the_line(here, text, what, line, remedy):
    with pytest.raises(UserError) as caught:
        from_file(here, text)
    assert what in caught.value.what
    assert caught.value.where.startswith(f"{here}/c.yaml" + (f", line {line}" if line else ""))
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "where", "remedy"),
    [
        ("student.epochs: 3\n", "student.epochs", "student: {epochs: …}"),
        ("student: {epoch: 3}\n", "student.epoch", "student.epochs"),
        ('student: {epochs: "3"}\n', "student.epochs", "config"),
        ("data: {source: null}\n", "data.source", "config"),
        ("student: 3\n", "student", "config"),
        ("data: {train: {a: b}}\n", "data.train", "config"),
    ],
)
def test_a_field_that_a_file_gets_wrong_is_named(here, text, where, remedy):
    with pytest.raises(UserError) as caught:
        from_file(here, text)
    assert caught.value.where == where
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "field", "line", "none"),
    [
        ("data: {train: ''}\n", "data.train", 1, ", or null for none"),
        ("data:\n  test: '  '\n", "data.test", 2, ", or null for none"),
        ('data:\n  train: [a, ""]\n', "data.train", 2, ", or null for none"),
        ("name: x\nrun: {dir: ''}\n", "run.dir", 2, ", or null for none"),
        ("teacher: {weights: ''}\n", "teacher.weights", 1, ", or null for none"),
        ("student: {ds_config: ''}\n", "student.ds_config", 1, ", or null for none"),
        ("stream:\n  cache_dir: ''\n", "stream.cache_dir", 2, ""),
        ('{"data": {"train": ""}}', "data.train", 1, ", or null for none"),
    ],
)
def test_an_empty_path_is_not_the_working_directory(here, text, field, line, none):
    with pytest.raises(UserError) as caught:
        from_file(here, text)
    assert caught.value.what == "an empty path"
    assert caught.value.where == f"{here}/c.yaml, line {line}: {field}"
    assert caught.value.remedy == f"write a path{none}"
    for override in (f"{field}=''", f'{field}="  "'):
        with pytest.raises(UserError, match="an empty path") as caught:
            settings.load("demo", [override])
        assert (caught.value.where, caught.value.remedy) == (field, f"{field}=PATH")
    assert from_file(here, "data: {train: ' a', test: }\n").data.train == f"{here}/ a"


def test_a_run_folder_in_place_of_a_config_names_its_file(here):
    os.makedirs(f"{here}/run")
    with open(f"{here}/run/config.yaml", "w") as file:
        file.write(settings.as_yaml(settings.load("demo")))
    with pytest.raises(UserError) as caught:
        settings.load(f"{here}/run")
    assert f"did you mean {here}/run/config.yaml?" in caught.value.remedy


def test_the_config_of_a_moved_run_names_its_folder_of_today(tmp_path):
    made = settings.load("demo", ["run.dir=/x/$$a", "data.train=/d/$$b"])
    (tmp_path / "$moved").mkdir()
    (tmp_path / "$moved" / "config.yaml").write_text(settings.as_yaml(made))
    found = settings.of_run(tmp_path / "$moved")
    assert found.run.dir == str(tmp_path / "$moved")
    assert found.data == made.data


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--student.epochs=3"], "student.epochs=3"),
        (["--student.epochs", "3"], "student.epochs=VALUE"),
        (["--student.epoch=3"], "student.epochs=3"),
        (["--epochs=3"], "teacher.epochs=3 or student.epochs=3"),
        (["--set", "student.epochs=3"], "student.epochs=20 alone"),
        (["student.epochs", "=", "3"], "student.epochs=20"),
        (["cifar10"], "--config cifar10"),
        (["my.yaml", "student.epochs=3"], "--config my.yaml"),
    ],
)
def test_options_that_are_meant_as_overrides_get_a_hint(arguments, remedy, capsys):
    assert cli.main(["run", "--dry-run", *arguments]) == 2
    said = capsys.readouterr().err
    assert remedy in said.partition("remedy:")[2]
    assert "Traceback" not in said


# Fields that have moved


def notes_of(overrides: list[str], source: str = "demo") -> tuple[Config, list[str]]:
    notes: list[str] = []
    return settings.load(source, overrides, notes.append), notes


MOVED = {  # and a value other than the preset's
    **{"graph.exact": "no", "graph.recall": "0.5", "graph.warm_start": "off", "graph.probes": "3"},
    **{"graph.parts": "3", "graph.partitioner": "ranges", "graph.repartition_cut": "2"},
    **{"graph.move_gain": "1e1", "graph.fanouts": "[11, 4]", "graph.second_hop": "cached"},
    **{"graph.sampler": "dgl", "graph.query": "table"},
}


@pytest.mark.parametrize(("old", "typed"), MOVED.items())
def test_a_field_is_read_by_the_name_that_it_had_once(here, old, typed):
    assert MOVED.keys() == field_names.moved().keys()
    new = field_names.current_name(old)
    by_new, none = notes_of([f"{new}={typed}"])
    assert none == []
    by_old, notes = notes_of([f"{old}={typed}"])
    assert by_old == by_new != settings.load("demo")
    assert notes == [f"{old} is now {new}; the old names are still accepted"]
    section, name = old.split(".")
    with open(f"{here}/old.yaml", "w") as file:
        file.write(f"{section}: {{{name}: {typed}}}")
    by_file, notes = notes_of([], f"{here}/old.yaml")
    assert value(by_file, new) == value(by_new, new)
    assert len(notes) == 1
    by_section, notes = notes_of([f"{section}={{{name}: {typed}}}"])
    assert by_section == by_new
    assert len(notes) == 1


def test_the_config_of_an_old_run_is_read_with_one_note(here, capsys):
    now = settings.load("demo", ["graph.search.exact=false", "graph.sampling.fanouts=[11, 4]"])
    tree = settings.as_tree(now)
    for old, new in field_names.moved().items():
        _, section, name = new.split(".")
        tree["graph"][old.split(".")[1]] = tree["graph"][section].pop(name)
    for section in ("search", "partition", "sampling"):
        assert tree["graph"].pop(section) == {}
    assert settings.check(tree) == now
    with open(f"{here}/config.yaml", "w") as file:
        yaml.safe_dump(tree, file)
    found, notes = notes_of([], f"{here}/config.yaml")
    assert found == now
    assert len(notes) == 1
    assert "9 more have moved" in notes[0]
    assert settings.of_run(Path(here)).graph == now.graph  # no note in a prediction
    assert cli.main(["config", "--config", f"{here}/config.yaml"]) == 0
    said = capsys.readouterr()
    assert said.err.count("note: ") == 1
    assert yaml.safe_load(said.out)["graph"] == settings.as_tree(now)["graph"]


def test_of_an_old_and_a_new_name_in_a_file_none_is_guessed(here):
    with pytest.raises(UserError, match=r"given twice: graph\.exact is its old name") as caught:
        from_file(here, "graph: {exact: true, search: {exact: false}}")
    assert caught.value.where == f"{here}/c.yaml: graph.search.exact"
    text = "graph: {exact: false}"
    with open(f"{here}/old.yaml", "w") as file:
        file.write(text)
    for name in ("graph.search.exact", "graph.exact"):  # an override counts under either name
        assert settings.load(f"{here}/old.yaml", [f"{name}=true"]).graph.search.exact
    later = settings.load("demo", ["graph.exact=true", "graph.search.exact=false"])
    assert not later.graph.search.exact


@pytest.mark.parametrize(
    ("typed", "where", "meant"),
    [
        ("graph.fanout=[9,8]", "graph.fanout", "graph.sampling.fanouts"),
        ("graph.probe=8", "graph.probe", "graph.search.probes"),
        ("graph.search.exat=true", "graph.search.exat", "graph.search.exact"),
        ("graph.sampling.parts=2", "graph.sampling.parts", "graph.partition.parts"),
        ("graph.serch.exact=true", "graph.serch", "graph.search"),
        ("graph={exat: true}", "graph.exat", "graph.search.exact"),
        ("graph.partition={part: 2}", "graph.partition.part", "graph.partition.parts"),
    ],
)
def test_names_that_nothing_has_are_refused_with_the_nearest(typed, where, meant):
    with pytest.raises(UserError, match="no field with this name") as caught:
        settings.load("demo", [typed])
    assert (caught.value.where, caught.value.remedy) == (where, f"did you mean {meant}?")


def test_sections_within_sections(here):
    base = settings.load("demo")
    found = settings.load("demo", ["graph={dim: 8, sampling: {query: table}}"])
    assert found.graph.dim == 8
    assert found.graph.sampling == base.graph.sampling.model_copy(update={"query": "table"})
    assert found.graph.search == base.graph.search
    round_trip(found, here)
    with pytest.raises(UserError, match="is a section") as caught:
        settings.load("demo", ["graph.search=3"])
    assert caught.value.where == "graph.search"
    with pytest.raises(UserError, match=r"graph\.search is a section"):
        from_file(here, "graph: {search: 3, exact: true}")
    with pytest.raises(UserError) as caught:
        from_file(here, "graph.search.exact: true")
    assert "graph: {search: {exact: …}}" in caught.value.remedy
    text = settings.describe()
    for line in ("graph.search: How", "  graph.search.exact = true", "graph.sampling: Which"):
        assert line in text
    assert "  graph.exact" not in text


def test_blanks_around_the_equals_sign_within_one_argument_do_no_harm():
    assert settings.load("demo", ["student.epochs = 7"]).student.epochs == 7
