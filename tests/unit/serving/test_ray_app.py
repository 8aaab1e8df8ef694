"""What a replica returns to Serve for a batch: the class itself, without Ray."""

from __future__ import annotations

from pathlib import Path

from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.serving import ray_app
from cnn2gnn_dist.serving.batching import Job
from tests.support.models import pictures, write_model
from tests.unit.serving.test_batching import Poisoned, images


def test_a_request_that_breaks_its_batch_fails_alone(tmp_path: Path):
    model = write_model(tmp_path / "m")
    own = ray_app.Replica.func_or_class.__mro__[1]  # Serve's wrapper asks for a running replica
    replica = own({"model": str(model), "device": "cpu"})
    replica.live.current.__class__ = Poisoned
    bad = Job([Pixels("poison", pictures(1)[0])], 1, 0)
    first, error, last = replica._answered([Job(images(2), 1, 0), bad, Job(images(3, 5), 2, 1)])
    replica._network.shutdown()
    assert isinstance(error, ArithmeticError)
    apart = Classifier.open(model, device="cpu")
    assert first.answers == apart.answers(images(2), apart.memory, top=1, neighbours=0)
    assert last.answers == apart.answers(images(3, 5), apart.memory, top=2, neighbours=1)
