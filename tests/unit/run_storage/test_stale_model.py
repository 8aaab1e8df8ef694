"""A stored run whose model is stale: what it has forgotten is there before it is set aside."""

from __future__ import annotations

from pathlib import Path

from cnn2gnn_dist import ledger, settings
from cnn2gnn_dist.inference.folder.artefact import MEMORY
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline.planning import Step
from cnn2gnn_dist.pipeline.registry import STAGES
from cnn2gnn_dist.pipeline.stored import Stored, looked_at
from cnn2gnn_dist.stages.earlier_models import forgotten_of_run
from tests.unit.run_storage.test_session import finished, opened


def test_the_list_of_forgotten_images_is_there_as_soon_as_the_storage_is_open(tmp_path: Path):
    """On fresh scratch, without the model: the index leaves these images out, and a plan says so."""
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
