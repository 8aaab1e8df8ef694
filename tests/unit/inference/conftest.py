import shutil

import pytest

from cnn2gnn_dist.inference.classifier import Classifier
from tests.support.models import calibrate, write_model


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A small model on disk, which tests must not change."""
    return write_model(tmp_path_factory.mktemp("written") / "m")


@pytest.fixture(scope="session")
def written_calibrated(written, tmp_path_factory):
    """The same with calibration images; shared, because fitting takes longer than most tests."""
    folder = tmp_path_factory.mktemp("calibrated") / "m"
    shutil.copytree(written, folder)
    calibrate(folder)
    return folder


@pytest.fixture
def model(written, tmp_path):
    """A copy of it, opened, that a test may change."""
    shutil.copytree(written, tmp_path / "m")
    return Classifier.open(tmp_path / "m", device="cpu")


@pytest.fixture
def calibrated(written_calibrated, tmp_path):
    """A copy of the calibrated one, opened, that a test may change."""
    shutil.copytree(written_calibrated, tmp_path / "m")
    return Classifier.open(tmp_path / "m", device="cpu")
