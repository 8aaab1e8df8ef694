"""The rules of the ledger: what a folder records about a stage, and what is never lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cnn2gnn_dist import ledger
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Entry, Status

PARTS = {"seed": 0, "teacher": {"epochs": 3}}


def made(folder: Path, key: str = "k") -> Entry:
    """A stage that has run under this key, with two outputs."""
    ledger.begin(folder, Entry(key, PARTS))
    (folder / "sub").mkdir(exist_ok=True)
    files = [folder / "sub" / "b.bin", folder / "a.bin"]
    for length, file in enumerate(files, 3):
        file.write_bytes(b"x" * length)
    entry = Entry(key, PARTS, "digest", ledger.outputs(folder, files), 1.5, {"index": "d"})
    ledger.finish(folder, entry)
    return entry


def test_a_stage_from_nothing_to_whole(tmp_path):
    folder = tmp_path / "deep" / "teacher"
    assert ledger.status(folder, "k") == (Status.FRESH, None)
    folder.mkdir(parents=True)
    assert ledger.status(folder, "k") == (Status.FRESH, None)
    ledger.begin(folder, Entry("k", PARTS))
    assert ledger.status(folder, "k") == (Status.RESUME, Entry("k", PARTS))
    assert ledger.finished(folder) is None
    entry = made(folder)
    assert entry.outputs == (("a.bin", 4), ("sub/b.bin", 3))
    assert ledger.status(folder, "k") == (Status.COMPLETE, entry)
    assert ledger.finished(folder) == entry
    assert ledger.missing(folder, entry) == ""


def test_another_key_is_stale_once_there_is_something_to_lose(tmp_path):
    begun = Entry("k", PARTS)
    ledger.begin(tmp_path, begun)
    assert ledger.status(tmp_path, "other") == (Status.FRESH, None)  # nothing but the record
    (tmp_path / "metrics.jsonl").touch()
    assert ledger.status(tmp_path, "other") == (Status.STALE, begun)
    entry = made(tmp_path)
    assert ledger.status(tmp_path, "other") == (Status.STALE, entry)


def test_files_without_a_record_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert ledger.status(tmp_path, "k") == (Status.STALE, None)


def test_beginning_again_makes_a_finished_stage_unfinished(tmp_path):
    made(tmp_path)
    ledger.begin(tmp_path, Entry("k2", PARTS))
    assert ledger.finished(tmp_path) is None
    assert ledger.status(tmp_path, "k2")[0] is Status.RESUME
    assert ledger.status(tmp_path, "k")[0] is Status.STALE


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"xx"), "2 bytes instead of"),
        (lambda path: path.write_bytes(b"x" * 9), "9 bytes instead of"),
        (lambda path: (path.unlink(), path.mkdir()), "is missing"),
    ],
)
@pytest.mark.parametrize("name", ["a.bin", "sub/b.bin"])
def test_an_output_that_is_not_what_it_was_is_made_again(tmp_path, harm, words, name):
    entry = made(tmp_path)
    harm(tmp_path / name)
    assert ledger.status(tmp_path, "k") == (Status.RESUME, entry)
    said = ledger.missing(tmp_path, entry)
    assert said.startswith(name)
    assert words in said


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", '{"key": "k"}', '{"key": "k", "parts": {}, "digest": "", "outputs": 3, "seconds": 1}',
     '{"key": "k", "parts": {}, "digest": "", "outputs": [["a", "x"]], "seconds": 1}',
     '{"key": "k", "parts": {}, "digest": "", "outputs": [], "seconds": "soon"}'],
)  # fmt: skip
def test_a_note_that_a_kill_cut_off_counts_as_none(tmp_path, text):
    made(tmp_path)
    (tmp_path / "done.json").write_text(text)
    assert ledger.status(tmp_path, "k")[0] is Status.RESUME
    (tmp_path / "begin.json").write_text(text)
    assert ledger.status(tmp_path, "k") == (Status.STALE, None)


def test_a_note_of_before_there_were_inputs_is_read(tmp_path):
    entry = made(tmp_path)
    raw = json.loads((tmp_path / "done.json").read_text())
    del raw["inputs"]
    (tmp_path / "done.json").write_text(json.dumps(raw))
    found = ledger.finished(tmp_path)
    assert found is not None
    assert (found.key, found.outputs, found.seconds) == (entry.key, entry.outputs, 1.5)
    assert found.inputs == {}


def test_a_note_says_by_which_schema_its_key_was_made(tmp_path):
    made(tmp_path)
    raw = json.loads((tmp_path / "done.json").read_text())
    assert raw["schema"] == ledger.SCHEMA
    assert json.loads((tmp_path / "begin.json").read_text())["schema"] == ledger.SCHEMA
    del raw["schema"]  # from before it was recorded
    (tmp_path / "done.json").write_text(json.dumps(raw))
    found = ledger.recorded(tmp_path)
    assert found is not None
    assert found.schema == 1
    (tmp_path / "done.json").unlink()
    found = ledger.recorded(tmp_path)
    assert found is not None
    assert found.outputs == ()


def test_a_key_is_of_all_that_goes_in_and_of_no_order():
    key = ledger.key_of("teacher", {"a": 1, "b": {"c": 2, "d": 3}}, {"index": "x", "pack": "y"})
    assert len(key) == 20
    same = ledger.key_of("teacher", {"b": {"d": 3, "c": 2}, "a": 1}, {"pack": "y", "index": "x"})
    assert key == same
    others = [
        ledger.key_of("student", {"a": 1, "b": {"c": 2, "d": 3}}, {"index": "x", "pack": "y"}),
        ledger.key_of("teacher", {"a": 1, "b": {"c": 2, "d": 4}}, {"index": "x", "pack": "y"}),
        ledger.key_of("teacher", {"a": 1, "b": {"c": 2}}, {"index": "x", "pack": "y"}),
        ledger.key_of("teacher", {"a": 1, "b": {"c": 2, "d": 3}}, {"index": "x", "pack": "z"}),
        ledger.key_of("teacher", {"a": 1, "b": {"c": 2, "d": 3}}, {"index": "x"}),
    ]
    assert len({key, *others}) == 6
    # Pinned: a change of these values would make every finished run stale.
    pinned = {1: "b84ab14ca17fcfa4ac61", 2: "f1d4ac80a1cdae087906"}
    for schema, expected in pinned.items():
        assert ledger.key_of("index", {"seed": 0}, {"pack": "abc"}, schema) == expected
    assert ledger.digest_of("files", {"files": []}) == "3fd4f60fabe303c0e260"


def test_nothing_is_written_over_when_set_aside(tmp_path):
    names = []
    for number in range(3):
        folder = tmp_path / "teacher"
        made(folder, f"k{number}")
        names.append(ledger.set_aside(folder).name)
        assert not folder.exists()
    assert names == ["teacher.old-1", "teacher.old-2", "teacher.old-3"]
    for number, name in enumerate(names):
        assert ledger.status(tmp_path / name, f"k{number}")[0] is Status.COMPLETE


def test_a_folder_is_a_runs_or_becomes_one(tmp_path):
    root = tmp_path / "runs" / "new"
    ledger.claim(root, "a: 1\n")
    assert (root / "config.yaml").read_text() == "a: 1\n"
    (root / "teacher").mkdir()
    ledger.claim(root, "a: 2\n")  # it may still be refused: the config is not replaced yet
    assert (root / "config.yaml").read_text() == "a: 1\n"
    ledger.record_config(root, "a: 2\n")
    assert (root / "config.yaml").read_text() == "a: 2\n"
    for name in ("file", "link"):
        (tmp_path / "file").touch()
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("nowhere")
        with pytest.raises(UserError, match="not a folder"):
            ledger.claim(tmp_path / name, "a: 1\n")
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "letter.txt").touch()
    with pytest.raises(UserError, match="not empty") as caught:
        ledger.claim(foreign, "a: 1\n")
    assert caught.value.where == str(foreign)
    assert [path.name for path in foreign.iterdir()] == ["letter.txt"]


def test_a_lock_alone_does_not_make_a_folder_foreign(tmp_path):
    (tmp_path / ".lock-host").touch()
    ledger.claim(tmp_path, "a: 1\n")
    assert (tmp_path / "config.yaml").is_file()


def test_a_stage_makes_the_folders_above_its_own(tmp_path):
    ledger.begin(tmp_path / "run" / "teacher", Entry("k", PARTS))
    assert ledger.status(tmp_path / "run" / "teacher", "k")[0] is Status.RESUME
