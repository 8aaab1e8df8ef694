"""``cnn2gnn memory`` as users run it: in a fresh process, which has imported nothing else."""

import os
import subprocess
import sys

import pytest

from tests.support.models import write_model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("written") / "m")


def in_a_process(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cnn2gnn_dist", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_keys_are_found_in_a_fresh_process(written):
    done = in_a_process("memory", "remove", written, "img-1")
    assert done.returncode == 0, done.stderr
    assert "remove 1 image; 39 images" in done.stdout
