"""A stored run whose model is stale: what it has forgotten is there before it is set aside."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist import cli, ledger, settings
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.inference.folder.artefact import MEMORY
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.memory.forgetting import record_forgotten
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline.planning import Step
from cnn2gnn_dist.pipeline.registry import STAGES
from cnn2gnn_dist.pipeline.stored import Stored, looked_at
from cnn2gnn_dist.run_storage.session import RunStorage
from cnn2gnn_dist.stages.earlier_models import forgotten_of_run
from tests.support.shards import make_shards, random_images
from tests.unit.run_storage.test_session import URL, finished, opened


def test_the_list_of_forgotten_images_is_there_as_soon_as_the_storage_is_open(tmp_path: Path):
    """On fresh scratch, without the model: the index leaves these images out."""
    here, there = tmp_path / "here", tmp_path / "there"
    storage = opened(here)
    finished(here / "model", {"w": b"weights"})
    (here / "model" / MEMORY).mkdir()
    (here / "model" / MEMORY / store.FORGOTTEN).write_text("key,class\na-1,drop?\n")
    storage.keep_stage("model", made=True)

    config = settings.load("demo", [f"run.dir={there}", "run.storage=memory://runs/one"])
    with looked_at(config) as (seen, _):
        assert forgotten_of_run(Path(seen.run.dir)) == ["a-1"]
    assert not there.exists()
    stored = Stored(config)
    stored._open()
    assert forgotten_of_run(there) == ["a-1"]
    stored.before(Step(STAGES["model"], "another key", Status.STALE, ""), [], False)
    ledger.set_aside(there / "model")
    assert forgotten_of_run(there) == ["a-1"]
    assert not (there / "model.old-1" / "w").exists()


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[str]]:
    """A stored run that is indexed, and whose model has forgotten two training images; its folder, and its config."""
    make_shards(tmp_path / "data", random_images(24, 8, 8), np.arange(24) % 3)
    root, data = tmp_path / "run", [f"data.train={tmp_path}/data/*.tar", "data.source=shards"]
    given = ["--config", "demo", *data, "data.calibration=0", f"run.storage={URL}"]
    assert cli.main(["index", *given, f"run.dir={root}"]) == 0
    storage = RunStorage.open(root, URL)
    finished(root / "model", {"memory/part": b"of the memory"})
    train = Manifest.load(root / "manifest" / "train.arrow")
    record_forgotten(root / "model" / MEMORY, train.keys.to_pylist()[:2])
    storage.keep_stage("model", made=True)
    return root, given


@pytest.mark.parametrize("fresh", [True, False])
def test_a_plan_says_that_forgotten_images_are_still_trained_on(run, tmp_path, capsys, fresh):
    """On fresh scratch, and where only the list is missing; it's named by where it will be, and isn't put there."""
    root, given = run
    if fresh:
        root = tmp_path / "elsewhere"
    else:
        (root / "model" / MEMORY / store.FORGOTTEN).unlink()
    capsys.readouterr()
    assert cli.main(["run", *given, f"run.dir={root}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "note: 2 images that the memory of this run's model has forgotten are still" in said
    steps = re.search(
        r"leave them out, `cnn2gnn (\S+)` with .*?, `cp (\S+) (\S+)`, then (\S+), with --update",
        said,
    )
    assert steps is not None
    assert steps[2] == f"{root}/model/memory/forgotten.csv"
    assert not Path(steps[2]).exists()
    assert root.exists() != fresh
    # The remedy.
    assert cli.main([steps[1], *given, f"run.dir={root}"]) == 0
    shutil.copy(steps[2], steps[3])
    assert cli.main([steps[1], *given, f"run.dir={root}", steps[4], "--update"]) == 0
    train = Manifest.load(root / "manifest" / "train.arrow").keys.to_pylist()
    assert not set(train).intersection(forgotten_of_run(root))


def test_the_list_outlives_a_kill_before_the_new_model_is_stored(run, tmp_path):
    """Of the models that were set aside the last one's counts."""
    root, given = run
    storage = RunStorage.open(root, URL)
    for key in ("of another run", "of a third one"):
        storage.set_aside("model")
        ledger.set_aside(root / "model")
        finished(root / "model", {"memory/part": b"of the memory"})
        record_forgotten(root / "model" / MEMORY, [*forgotten_of_run(root), key])
        storage.keep_stage("model", made=True)
    expected = forgotten_of_run(root)
    assert len(expected) == 4
    storage.set_aside("model")  # and here the host is lost

    there = tmp_path / "there"
    config = settings.load("demo", [f"run.dir={there}", f"run.storage={URL}"])
    with looked_at(config) as (seen, _):
        assert sorted(forgotten_of_run(Path(seen.run.dir))) == sorted(expected)
    Stored(config)._open()
    assert sorted(forgotten_of_run(there)) == sorted(expected)
    assert not (there / "model.old-3" / MEMORY / "part").exists()
    assert cli.main(["index", *given, f"run.dir={there}", "data.holdout=0.2", "--update"]) == 0
    assert not set(Manifest.load(there / "manifest" / "train.arrow").keys.to_pylist()) & set(
        expected
    )


def test_the_list_of_the_last_model_comes_though_another_one_was_set_aside_here(run, tmp_path):
    """Folders are numbered where models are set aside: this host's first one is not the storage's."""
    root, given = run
    expected = forgotten_of_run(root)
    (root / "model.old-1" / MEMORY).mkdir(parents=True)
    record_forgotten(root / "model.old-1" / MEMORY, ["of an earlier model"])
    RunStorage.open(root, URL).set_aside("model")  # on a host that is lost afterwards
    shutil.rmtree(root / "model")

    config = settings.load("demo", [f"run.dir={root}", f"run.storage={URL}"])
    for _ in range(2):  # once is enough
        Stored(config)._open()
        assert set(forgotten_of_run(root)) == {"of an earlier model", *expected}
    assert sorted(path.name for path in root.glob("model*")) == ["model.old-1", "model.old-2"]
    assert cli.main(["index", *given, f"run.dir={root}", "data.holdout=0.3", "--update"]) == 0
    train = Manifest.load(root / "manifest" / "train.arrow").keys.to_pylist()
    assert not set(train).intersection(expected)
