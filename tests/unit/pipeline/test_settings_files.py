"""Config files are interpreted as they were meant, or refused with the line number."""

from __future__ import annotations

import os

import pytest

from cnn2gnn_dist import settings
from cnn2gnn_dist.errors import UserError
from tests.unit.pipeline.test_settings import from_file, here, round_trip, value  # noqa: F401

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
