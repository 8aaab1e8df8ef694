"""A run whose model is not that of its current student: who notices, and what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import cnn2gnn_dist
from cnn2gnn_dist import cli, ledger
from cnn2gnn_dist.errors import UserError
from tests.support.shards import encode_image, random_images


@pytest.fixture
def retrained(micro_run, tmp_path) -> Path:
    """A copy of the run after its student alone was trained again."""
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    done = run / "student" / ledger.DONE
    done.write_text(json.dumps(json.loads(done.read_text()) | {"digest": "another"}))
    graph = run / "graph" / ledger.DONE  # built on it
    entry = json.loads(graph.read_text())
    entry["inputs"]["student"] = "another"
    graph.write_text(json.dumps(entry))
    return run


@pytest.fixture
def unfinished(micro_run, tmp_path) -> Path:
    """A copy of the run in which the stage model was interrupted."""
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    (run / "model" / ledger.DONE).unlink()
    return run


def in_a_replica(run: Path) -> object:
    from cnn2gnn_dist.serving.ray_app import Replica

    own = Replica.func_or_class.__mro__[1]  # Serve's wrapper asks for a running replica
    return own({"model": str(run), "device": "cpu"})


@pytest.mark.parametrize("run", ["retrained", "unfinished"])
@pytest.mark.parametrize("way", [cnn2gnn_dist.load, in_a_replica])
def test_a_model_that_is_not_current_is_refused(way, run, request):
    folder = request.getfixturevalue(run)
    with pytest.raises(UserError, match="not made from the run's current student") as caught:
        way(folder)
    assert "`cnn2gnn run --update`" in caught.value.remedy
    assert caught.value.remedy.endswith(f"name {folder / 'model'}")
    assert len(cnn2gnn_dist.load(folder / "model", device="cpu").required_memory())


@pytest.mark.parametrize("command", [["ls"], ["log"], ["compact"], ["forget", "x"], ["undo"]])
def test_memory_commands_refuse_it(command, retrained, capsys):
    assert cli.main(["memory", command[0], str(retrained), *command[1:]]) == 2
    assert "not made from the run's current student" in capsys.readouterr().err


def test_predict_notices_and_says_what_it_answers_from(retrained, tmp_path, console, capsys):
    image = tmp_path / "image.png"
    image.write_bytes(encode_image(random_images(1, 16, 16)[0]))
    assert cli.main(["predict", "--model", str(retrained), str(image)]) == 0
    assert "a temporary one is made from the run" in capsys.readouterr().err
    shutil.rmtree(retrained / "model")
    with pytest.raises(UserError, match="this run has no model yet"):
        cnn2gnn_dist.load(retrained)


@pytest.mark.parametrize(
    "command", ["predict --model {} x.png", "memory ls {}", "export {} --to new"]
)
def test_a_model_whose_files_are_elsewhere_is_named(command, micro_run, tmp_path, capsys):
    """As on a host that read only the record of a stored run's model."""
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    for file in (run / "model").iterdir():
        if file.name != ledger.DONE:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert cli.main([str(run) if part == "{}" else part for part in command.split()]) == 2
    said = capsys.readouterr().err
    assert "its files are not in this folder" in said
    assert "name its URL instead of the folder" in said


def test_a_server_that_edits_refuses_a_model_that_would_vanish(
    retrained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CNN2GNN_TOKEN", "a-token-of-enough-letters-0123456789")
    assert cli.main(["serve", str(retrained), "--port", "0"]) == 2
    said = capsys.readouterr()
    assert "edits of the memory could not be kept" in said.err
    assert f"`cnn2gnn export {retrained} --to MODEL`" in said.err
    assert "serving" not in said.out
