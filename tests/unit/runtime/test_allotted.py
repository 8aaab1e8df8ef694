"""Cores and memory in containers and jobs: what their control groups allow, of both versions of these."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from cnn2gnn_dist.runtime.hosts import allotted, host_checks

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores without control groups; returns the folder where it would show them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(allotted, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(allotted, "OWN", tmp_path / "own")
    return tmp_path / "cgroup"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 64), ("200000 100000", 2), ("150000 100000", 2), ("20000 100000", 1), ("9900000 100000", 64)],
)  # fmt: skip
def test_a_container_of_version_2(groups: Path, quota: str, cores: int) -> None:
    """In its own namespace of control groups: what it sees as the outermost is its own."""
    write(groups, cpu__max=quota)
    write(groups.parent, own="0::/")
    assert allotted.cores() == cores


def test_a_job_inside_limits_of_its_user(groups: Path) -> None:
    """As under Slurm: the step's group has none, that of the job and of all of the user's jobs do."""
    write(groups.parent, own="0::/user/job_7/step_0")
    write(groups / "user", cpu__max="1600000 100000")
    write(groups / "user/job_7", cpu__max="400000 100000")
    write(groups / "user/job_7/step_0", cpu__max="max 100000")
    assert allotted.cores() == 4


@pytest.mark.parametrize(("quota", "cores"), [("-1", 64), ("300000", 3)])
def test_version_1(groups: Path, quota: str, cores: int) -> None:
    """Docker without a namespace: the path is that on the host, which the container doesn't see."""
    write(groups.parent, own="3:cpu,cpuacct:/docker/1f\n2:memory:/docker/1f\n0::/docker/1f")
    write(groups / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert allotted.cores() == cores


def test_without_control_groups(groups: Path) -> None:
    assert allotted.cores() == 64
    assert allotted.available_memory() > 0


def test_memory_of_the_job(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = psutil.virtual_memory()._replace(available=512 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    write(groups.parent, own="2:memory:/slurm/job_7\n0::/pod")
    assert allotted.available_memory() == 512 * GIB
    write(groups / "memory/slurm/job_7", memory__limit_in_bytes=str(40 * GIB),
          memory__usage_in_bytes=str(9 * GIB), memory__stat=f"cache 5\ntotal_inactive_file {GIB}")  # fmt: skip
    assert allotted.available_memory() == 32 * GIB
    own = groups / "pod"
    write(own, memory__max=str(8 * GIB), memory__current=str(GIB), memory__stat="inactive_file 0")
    assert allotted.available_memory() == 7 * GIB
    write(own, memory__max="max")
    assert allotted.available_memory() == 32 * GIB


def test_ranks_are_counted_against_the_quota(groups: Path) -> None:
    write(groups, cpu__max="200000 100000")
    host_checks.check_cores(16, allotted.cores())
    with pytest.raises(Exception, match="17 ranks on 2 cores"):
        host_checks.check_cores(17, allotted.cores())
