"""A graph build that was killed continues to the same version, without repeating finished work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPOSITORY, graph_builds, rank_group, runs
from tests.support.forks import Fork


def build(
    run: Path, folder: Path, die_after: int = 0, batch: int = 16
) -> tuple[int, dict[str, Any]]:
    arguments = (run, folder, die_after, batch)
    fork = Fork(graph_builds.main, arguments, runs.environment(), REPOSITORY)
    code, output = runs.finish(fork)
    assert code in (0, -9), output[-3000:]
    return code, {} if code else json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The version of a build that is not killed."""
    code, found = build(micro_run, tmp_path_factory.mktemp("built") / "whole")
    assert code == 0
    return found


@pytest.mark.parametrize("die_after", [1, 5, 14])
def test_a_killed_build_goes_on_at_its_unit(
    micro_run: Path, whole: dict[str, Any], tmp_path: Path, die_after: int
) -> None:
    assert whole["embedded"] > 0
    assert whole["units"] > die_after
    code, _ = build(micro_run, tmp_path / "cut", die_after)
    assert code == -9
    assert not (tmp_path / "cut" / "v0007").exists()
    code, again = build(micro_run, tmp_path / "cut")
    assert code == 0
    assert again["embedded"] == 0
    # The worker thread may be ahead of the counting one when the kill arrives.
    assert 0 < again["units"] <= whole["units"] - die_after
    assert again["files"] == whole["files"]
    names = [path.name for path in (tmp_path / "cut").iterdir()]
    assert names == ["v0007"]


def test_other_batches_begin_again(micro_run: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """Finished batches are counted: of another size they would be other images."""
    code, _ = build(micro_run, tmp_path / "cut", 1)
    assert code == -9
    code, again = build(micro_run, tmp_path / "cut", batch=24)
    assert code == 0
    assert again["embedded"] > 0
    assert again["files"].keys() == whole["files"].keys()
    assert again["files"]["labels.npy"] == whole["files"]["labels.npy"]


def test_a_build_rests_on_no_barrier(
    micro_run: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Although one rank embeds much more slowly, the graph is bit-identical to that of a single rank.

    Each rank cuts its own part of it.
    """
    (tmp_path / "two").mkdir()
    built = rank_group.run(graph_builds.slow_second_rank, 2, micro_run, tmp_path / "two")
    assert [one["files"] for one in built] == [whole["files"]] * 2
    assert [one["cut"] for one in built] == [[0], [1]]
    assert {"twin.npy", "candidates.npy", "x.npy"} <= set(whole["files"])
