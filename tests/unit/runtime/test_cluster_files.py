"""cluster/ray-cluster.yaml is valid by Ray's own schema, and contains what its hosts need."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import pytest
import yaml

from tests.support import REPOSITORY

FILE = REPOSITORY / "cluster" / "ray-cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_ray_accepts_the_cluster(config):
    from ray.autoscaler._private import util

    util.validate_config(util.prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="worker_start"):
        util.validate_config(util.prepare_config(config | {"worker_start": []}))


def test_the_three_lines_are_the_addresses_and_the_login():
    lines = [line for line in FILE.read_text().splitlines() if re.search(r"# \d: ", line)]
    assert [line.split(":")[0].strip() for line in lines] == ["head_ip", "worker_ips", "ssh_user"]


def test_every_start_has_the_token_and_none_listens_elsewhere(config):
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert "~/.ray/auth_token" in config["file_mounts"]
    head = next(command for command in starts if "--head" in command)
    assert "--node-ip-address=" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=" in head  # without it no worker is ever started, nor
    assert "RAY_enable_autoscaler_v2=0" in head  # by the second autoscaler


def test_what_is_run_by_its_path_is_executable():
    for name in ("ray-worker.sh",):
        assert os.access(REPOSITORY / "cluster" / name, os.X_OK)
