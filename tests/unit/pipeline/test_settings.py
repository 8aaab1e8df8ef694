"""What users type is interpreted as they meant it, or refused with a remedy that works."""

from __future__ import annotations

import os
import re
import shlex

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cnn2gnn_dist import cli, field_names, settings
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


def from_file(here: str, text: str | bytes) -> Config:
    with open(f"{here}/c.yaml", "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return settings.load(f"{here}/c.yaml")


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
    *[("name", text, text) for text in ("2024-05-01", "1e3", "0012", "no", "nan", "none", "1_0")],
    *[("data.label_column", text, text) for text in ("y", "no", "on", "0", "1.0", "none", "a: b")],
    *[("data.image_column", text, "null") for text in ('"null"', "'null'")],
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


def test_a_password_in_a_url_is_not_repeated():
    with pytest.raises(UserError) as caught:
        settings.load("demo", ["data.train=[https://h/a.tar, https://me:p@w@h/b.tar]"])
    assert caught.value.where == "data.train=https://…@h/b.tar"
    settings.load("demo", ["data.train=https://me@h:8443/a@b:c.tar"])


def round_trip(config: Config, here: str) -> None:
    text = settings.as_yaml(config)
    with open(f"{here}/again.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    assert settings.load(f"{here}/again.yaml") == config
    assert settings.check(settings.as_tree(config)) == config
    plain = yaml.safe_load(text.replace("$$", "$"))  # other YAML readers see the same values
    assert plain == settings.as_tree(config)


folder_names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12
)


@given(st.lists(folder_names, min_size=5, max_size=5))
@hypothesis_settings(max_examples=examples(75), deadline=None)
def test_any_name_of_a_folder_survives_being_written_and_read(names):
    """Five names per file, because reading and writing a config takes most of the time."""
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
    ("data.image_column=null", "always has a value", "data.image_column", "='\"null\"'"),
    ("name=NULL", "always has a value", "name", "leave name out for its default"),
    ("data.train=", "without a value", "data.train", "data.train=null"),
    ("student.epochs=", "without a value", "student.epochs", "student.epochs="),
    ("data.train=/a/x,/b/y", "several paths", "data.train", "data.train='[/a/x, /b/y]'"),
    ("data.train=/a/x /b/y", "several paths", "data.train", "data.train='[\"/a/x /b/y\"]'"),
    ("data.train=[]", "empty list", "data.train", "data.train"),
    ("data.train=${NOWHERE}/x", "NOWHERE is not set", "data.train", "export NOWHERE"),
    ("run.dir=$EMPTY/x", "EMPTY is empty", "run.dir", "export EMPTY"),
    ("data.train=file://host/x", "another machine", "data.train", "data.train=/"),
    ("run.dir=~nobody-here/x", "no user 'nobody-here'", "run.dir", "run.dir=./~nobody-here/x"),
    ("run.dir=s3://b/x", "not a URL", "run.dir", "this URL as run.storage"),
    ("teacher.weights=https://a/x.pth", "not a URL", "teacher.weights", "download it"),
    ("stream.cache_dir=s3://b/x", "not a URL", "stream.cache_dir", "stream.cache_dir=PATH"),
    ("data.train=https://me:pw@h/{0..9}.tar", "password", "data.train", ".netrc"),
    ("data.test=[/a.tar, https://me:p@w@h/a.tar]", "password", "data.test", ".netrc"),
    ("run.storage=s3://key:secret@b/x", "password", "run.storage", ".aws"),
    ("run.dir=/x/\udcff", "not UTF-8", "run.dir", "UTF-8"),
    ("cluster.rank_resources={CPU: 8}", "Ray's own", "cluster.rank_resources", "cpus_per_rank"),
    ("cluster.reader_resources={a: 1, b: 0}", "above 0", "cluster.reader_resources", "trainer"),
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
    """Each ``field=value`` in a remedy is accepted when it is typed after what was refused."""
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
    """bash turns data.train=/d/{0..2}.tar into three arguments; the last one alone is not what was meant."""
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
