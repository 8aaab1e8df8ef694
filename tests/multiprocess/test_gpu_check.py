"""The script for the first GPU run also runs to its end without a GPU, and its checks can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.runs import REPOSITORY, environment

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import gpu_check
from gpu_checking import Setting, alone, group

from cnn2gnn_dist.models import graph_head


def script(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "benchmarks/gpu_check.py",
            "--device",
            "cpu",
            "--out",
            str(out),
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
    )


def test_it_runs_to_its_last_line_and_makes_nothing_twice(tmp_path):
    """All checks that the test suite does not make anyway: complete runs are in test_ways_in and test_resume."""
    names = "environment,search,throughput,memory,barrier,sync_norm,zero3,lost_peer"
    done = script(tmp_path, "--only", names)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if "  " in line}
    wanted = {"environment", "search", "throughput", "memory", "barrier-1", "barrier-2", "zero3-2"}
    assert wanted <= rows.keys()
    assert rows["lost_peer-1"] == "skip"
    assert all(rows[name] == "pass" for name in wanted)
    assert "recognized after" in done.stdout
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    again = script(tmp_path, "--only", names)
    assert again.returncode == 0
    assert "…" not in again.stdout
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == before


def test_what_failed_is_made_again_and_what_passed_is_kept(tmp_path):
    for status, kept in (("pass", True), ("skip", True), ("fail", False)):
        file = tmp_path / f"{status}.json"
        file.write_text(json.dumps({"status": status, "toy": True}))
        assert (gpu_check._kept(file, True) is not None) == kept
        assert gpu_check._kept(file, False) is None  # toy sizes don't substitute for real ones
    (tmp_path / "torn.json").write_text('{"status": "pa')
    assert gpu_check._kept(tmp_path / "torn.json", True) is None


def test_groups_are_checked_on_one_rank_two_and_all(tmp_path):
    found = gpu_check.wanted(Setting("cuda", 0, 8, False, tmp_path), [])
    assert [one.ranks for name, one in found if name == "barrier"] == [1, 2, 8]
    assert [one.ranks for name, one in found if name == "pipeline"] == [1, 8]
    assert {name for name, _ in found} == {*gpu_check.ALONE, *gpu_check.TOGETHER, *gpu_check.WHOLE}
    alone_there = Setting("cuda", 0, 1, False, tmp_path)
    assert [one.ranks for _, one in gpu_check.wanted(alone_there, ["zero3"])] == [1]


def test_ranks_that_end_without_a_word_fail_and_one_is_meant_to_in_lost_peer():
    good = {"status": "pass", "figure": "", "numbers": {}}
    assert gpu_check._joined("barrier", 2, [dict(good)], [0, -6])["status"] == "fail"
    assert gpu_check._joined("lost_peer", 2, [dict(good)], [0, -9])["status"] == "pass"
    assert gpu_check._joined("lost_peer", 2, [], [-6, -9])["status"] == "fail"
    bad = {**good, "status": "fail"}
    assert gpu_check._joined("barrier", 2, [dict(good), bad], [0, 0])["status"] == "fail"


@pytest.fixture
def toy(tmp_path):
    return Setting("cpu", 0, 1, True, tmp_path)


def test_a_head_in_low_precision_is_found(toy, monkeypatch):
    assert alone.autocast(toy).holds

    def forward(self, x_BD):
        z = torch.nn.functional.normalize(self.norm(self.project(x_BD).float()), dim=1)
        return z

    monkeypatch.setattr(graph_head.GraphHead, "forward", forward)
    assert not alone.autocast(toy).holds


def test_a_search_that_misses_a_neighbour_is_found(toy, monkeypatch):
    from cnn2gnn_dist.graph.search.knn import Index

    assert alone.search(toy).holds
    search = Index.search

    def worse(self, query_Qd, m, *, exclude=None):
        ids, near = search(self, query_Qd, m + 1, exclude=exclude)
        ids[0, m - 1] = search(self, -query_Qd[:1], 1)[0][0, 0]
        return ids[:, :m], near[:, :m]

    monkeypatch.setattr(Index, "search", worse)
    assert not alone.search(toy).holds


@pytest.mark.parametrize(
    ("left", "holds"), [((11.0, 11.1), True), ((11.0, 10.5), False), ((10.6, 10.7), False)]
)
def test_a_barrier_is_judged_by_the_late_ranks_delay_whenever_the_others_began(left, holds):
    """Rank 0 began at 10.0 s and came DELAY_S later, or at once with a device that was busy; rank 1 began at 10.4 s."""
    came = 11.0 if holds else 10.0
    numbers = [(came, left[0], left[0] - 10.0), (10.4, left[1], left[1] - 10.4)]
    everyone = [{"host": one, "host_file": True} for one in numbers]
    assert group._held("host", everyone) == holds
    for one in everyone:
        one["host_file"] = False
    assert not group._held("host", everyone)


def test_norms_of_another_network_are_far_apart():
    found, wanted = torch.ones(3), torch.tensor([1.0, 1.0, 1.01])
    assert group._apart(found, wanted, [(found, wanted)]) == pytest.approx(0.01 / 1.01)
    assert alone._apart(found, wanted) > 5e-3
