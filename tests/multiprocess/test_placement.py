"""Where ranks and readers work on a Ray cluster of several nodes, and that a rank stays on its node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import short_folder
from tests.support.runs import environment

pytestmark = pytest.mark.ray


def said_by(program: str, folder: Path, timeout: float, **settings: str) -> str:
    """What a program prints that starts a Ray of several nodes."""
    command = [sys.executable, "-m", program, str(folder)]
    token = folder / "token"
    token.write_text("0" * 64)
    with short_folder() as own:
        env = environment(
            RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_TMPDIR=str(own), **settings
        )
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    said = said_by("tests.support.placed", tmp_path_factory.mktemp("placed"), 1100)
    return json.loads(said.splitlines()[-1])


def nodes(group: list[Any]) -> list[str]:
    return [rank[0] for rank in group]


def test_strategies(found):
    assert len(set(nodes(found["pack"]))) == 1
    assert len(set(nodes(found["spread"]))) == 2
    assert sorted(nodes(found["pinned"])) == sorted(found["trainers"])


def test_ranks_per_node(found):
    first, second, third, fourth = nodes(found["two each"])
    assert first == second != third == fourth
    assert {first, third} == set(found["trainers"])
    assert [rank[1] for rank in found["two each"]] == [0, 1, 0, 1]
    assert "can't be divided into groups of 2" in found["uneven"]


def test_actors_have_names_that_say_their_rank(found):
    for rank, (_, _, name) in enumerate(found["two each"]):
        assert name.startswith(f"rank-{rank}-")


def test_ranks_stay_where_they_were(found):
    before, after = zip(*found["again"], strict=True)
    assert before == after


def test_a_run_goes_on_with_fewer_ranks_where_a_node_is_lost(found):
    ((node, rank, world_size),) = found["fewer"]["group"]
    assert (rank, world_size) == (0, 1)
    assert set(found["fewer"]["lost"]) | {node} == set(found["trainers"])
    assert "no room for 3 ranks" in found["no room"]
    assert "nor for 2;" in found["no room"]


def test_readers_on_nodes_of_their_own(found):
    assert set(found["readers"]) == {found["cpus"]}
    assert "no node of the cluster has {'readers': 1}" in found["no reader"]


def test_work_of_a_lost_node_is_done_by_the_next_and_ends_with_the_last(tmp_path):
    sooner = {"period_ms": "1000", "timeout_ms": "5000", "failure_threshold": "3"}
    how = {f"RAY_health_check_{name}": value for name, value in sooner.items()}
    said = said_by("tests.support.lost_room", tmp_path, 600, **how)
    assert "[(1, 1)]" in said.splitlines()
    assert "no room for an actor of 1 CPUs and 0 GPUs" in said


def test_every_node_answers_the_doctor(found):
    nodes, failed = found["survey"]
    assert failed == {}
    assert len(nodes) == 4
    for node in nodes:
        assert (node["address"], node["shared"], node["unreachable"]) == ("127.0.0.1", "", "")
        assert node["versions"] == nodes[0]["versions"]
        assert node["rate"] > 0
        assert abs(node["offset_s"]) < 1  # all nodes have the same clock
