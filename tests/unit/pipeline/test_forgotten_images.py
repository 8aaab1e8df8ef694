"""The stage ``index`` of a run whose model has forgotten images, and its relabel list."""

import re
import shutil

import numpy as np
import pytest

from cnn2gnn_dist import cli, settings
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.index.relabel import names_of, read_relabel
from cnn2gnn_dist.inference.folder.artefact import MEMORY
from cnn2gnn_dist.inference.memory.forgetting import record_forgotten
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline import runner
from tests.support.shards import make_shards, random_images


@pytest.fixture
def given(tmp_path) -> list[str]:
    """Config of a run over 24 images of three classes."""
    make_shards(tmp_path / "data", random_images(24, 8, 8), np.arange(24) % 3)
    data = [f"data.train={tmp_path}/data/*.tar", "data.source=shards", "data.calibration=0"]
    return ["--config", "demo", f"run.dir={tmp_path}/run", *data]


def keys_of(run) -> list[str]:
    return Manifest.load(run / "manifest" / "train.arrow").keys.to_pylist()


def plan(given: list[str]):
    config = settings.load(given[1], given[2:])
    return config, runner.plan(config)


@pytest.mark.parametrize("folder", ["model", "model.old-1"])
def test_forgotten_images_are_left_out_when_the_index_is_made_anew(
    given, tmp_path, capsys, console, folder
):
    run, memory = tmp_path / "run", tmp_path / "run" / folder / MEMORY
    assert cli.main(["index", *given, "data.holdout=0.2"]) == 0
    before = keys_of(run)
    memory.mkdir(parents=True)
    record_forgotten(memory, [before[2], f"shard-000000/{before[0]}", "of another set"])
    # Not by itself: a finished run stays complete.
    assert cli.main(["index", *given, "data.holdout=0.2"]) == 0
    assert "complete, skipped" in capsys.readouterr().err
    assert keys_of(run) == before
    (run / "manifest").rename(run / "manifest.before")
    assert cli.main(["index", *given, "data.holdout=0.2"]) == 0
    assert "2 training images that the memory of the run's model has forgotten are left out" in (
        capsys.readouterr().err
    )
    assert keys_of(run) == [key for key in before if key not in (before[0], before[2])]
    config, steps = plan([*given, "data.holdout=0.2"])
    assert runner.forgotten_note(config, steps) is None


def test_a_class_that_was_forgotten_altogether_is_named(given, tmp_path, capsys):
    run, memory = tmp_path / "run", tmp_path / "run" / "model" / MEMORY
    assert cli.main(["index", *given]) == 0
    train = Manifest.load(run / "manifest" / "train.arrow")
    memory.mkdir(parents=True)
    record_forgotten(memory, [train.key(row) for row in np.flatnonzero(train.label_N == 1)])
    assert cli.main(["index", *given, "seed=3", "--update"]) == 0  # other images are held out
    capsys.readouterr()
    record_forgotten(memory, [f"shard-{row:05d}" for row in range(1, 24, 3)])
    assert cli.main(["index", *given, "seed=4", "--update"]) == 2
    said = capsys.readouterr().err
    assert "without the forgotten images there is no training image of '1'" in said
    assert cli.main(["index", *given, "seed=4", "--update", "data.allow_empty_classes=true"]) == 0
    assert 1 not in Manifest.load(run / "manifest" / "train.arrow").label_N


def test_a_training_on_forgotten_images_is_warned_of(given, tmp_path, capsys, console):
    run, memory = tmp_path / "run", tmp_path / "run" / "model" / MEMORY
    assert cli.main(["index", *given]) == 0
    memory.mkdir(parents=True)
    record_forgotten(memory, keys_of(run)[:3])
    capsys.readouterr()
    assert cli.main(["run", *given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        "note: 3 images that the memory of this run's model has forgotten are still trained on"
        in said
    )
    listed = f"data.relabel={run}-forgotten.csv"
    copied = re.search(rf"to leave them out, `cp (\S+) (\S+)`, then {listed}, with --update", said)
    assert copied is not None
    config, steps = plan(given)
    assert runner.forgotten_note(config, steps) in said
    assert runner.forgotten_note(config, steps[:1]) is None  # nothing is to be trained
    stale = plan([*given, "data.holdout=0.3"])[1]
    assert stale[0].status is Status.STALE
    assert runner.forgotten_note(config, stale) is None  # the index leaves them out
    # The remedy.
    shutil.copy(*copied.groups())
    assert cli.main(["index", *given, listed, "--update"]) == 0
    assert runner.forgotten_note(*plan([*given, listed])) is None
    record_forgotten(memory, ["another"])  # the index stays as it is
    assert plan([*given, listed])[1][0].status is Status.COMPLETE


def test_the_list_stays_as_it_was_applied(given, tmp_path):
    """Whatever becomes of the file: an audit adds its decisions to those of the training."""
    run, path = tmp_path / "run", tmp_path / "list.csv"
    kept = run / "manifest" / "relabel.csv"
    assert cli.main(["index", *given]) == 0
    assert not kept.exists()
    first, second = keys_of(run)[:2]
    path.write_text(f"key,class,note\n{first},2,x\n{second},drop,\nelse,drop?,\n")
    assert cli.main(["index", *given, f"data.relabel={path}", "--update"]) == 0
    applied = read_relabel(path)
    path.unlink()
    assert read_relabel(kept) == applied
    assert len(applied) == 3
    assert cli.main(["index", *given, "--update"]) == 0
    assert not kept.exists()


def test_a_list_loses_its_lines_on_forgotten_images(given, tmp_path):
    """Whatever they are called there: beside ``forgotten.csv``, they would be second decisions on these images."""
    run, path = tmp_path / "run", tmp_path / "list.csv"
    assert cli.main(["index", *given]) == 0
    first, second = keys_of(run)[:2]
    named = names_of(Manifest.load(run / "manifest" / "train.arrow"))
    long_name = next(name for name, row in named.items() if row == 0 and name != first)
    path.write_text(f"key,class\n{long_name},2\n{second},2\n")
    (run / "model" / MEMORY).mkdir(parents=True)
    record_forgotten(run / "model" / MEMORY, [first])
    assert cli.main(["index", *given, f"data.relabel={path}", "--update"]) == 0
    assert first not in keys_of(run)
    assert list(read_relabel(run / "manifest" / "relabel.csv")) == [second]
