"""The public stream: across processes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch

from tests.support import REPOSITORY
from tests.support.ports import free_port
from tests.support.shards import make_shards, random_images


def test_the_example_runs_under_torchrun_and_goes_on(tmp_path):
    images = random_images(200)
    make_shards(tmp_path / "s", images, np.arange(200) % 10, shard_size=50, suffix="jpg")
    checkpoint = tmp_path / "last.pt"

    def run(ranks: int, epochs: int) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        command += ["examples/stream.py", str(tmp_path / "s"), str(checkpoint), str(epochs)]
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(2, 2)
    state = torch.load(checkpoint, weights_only=True)["stream"]
    assert (state["epoch"], state["batch"]) == (2, 0)
    run(1, 3)
    assert torch.load(checkpoint, weights_only=True)["stream"]["epoch"] == 3
