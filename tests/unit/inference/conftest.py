import shutil

import pytest

from cnn2gnn_dist.inference.classifier import Classifier
from tests.support.models import write_model


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A small model on disk, not to be changed."""
    return write_model(tmp_path_factory.mktemp("written") / "m")


@pytest.fixture
def model(written, tmp_path):
    """A copy of it, opened."""
    shutil.copytree(written, tmp_path / "m")
    return Classifier.open(tmp_path / "m", device="cpu")
