"""What is wrong on one host is reported on all, in a line that names it, before anything is trained.

Each host resolves its own name to 127.0.1.1, as on Debian; the ranks meet nevertheless.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnn2gnn_dist.data.reading.reader import Reader, Request
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.group.exchange import ErrorExchange, every_rank
from cnn2gnn_dist.runtime.hosts import host_checks
from cnn2gnn_dist.runtime.shared_files import shared_folder
from cnn2gnn_dist.training.engine import Engine
from tests.support import REPOSITORY, host_runs, hosts, own_folders, rank_group
from tests.support.hosts import Host
from tests.support.shards import make_shards, random_images

needs_hosts = hosts.needed()
REMOTE = ["data.source=shards", "data.train=s3://images/shard-{0..9}.tar"]
"""Shards of which each host would keep copies."""


def as_debian_resolves(pair: tuple[Host, ...], folder: Path) -> None:
    a, b = pair
    a.resolve({a.name: "127.0.1.1", b.name: b.address})
    b.resolve({a.name: a.address, b.name: "127.0.1.1"})


folder, pair = hosts.fixtures(as_debian_resolves)


def refused(pair: tuple[Host, ...], folder: Path, *overrides: str, **how) -> str:
    """What rank 0 prints about a run that both ranks refuse."""
    arguments = host_runs.micro(folder / "runs" / "run", *overrides)
    found = host_runs.finish(host_runs.start(pair, arguments, MASTER_ADDR=pair[0].name, **how))
    assert [code for code, _ in found] == [2, 2], found
    said, quiet = (
        "".join(line for line in output.splitlines(True) if "[c10d]" not in line)
        for _, output in found
    )
    assert "Traceback" not in said + quiet
    assert "train.py: " not in quiet  # one report for all
    assert not (folder / "runs" / "run" / "teacher").exists()
    return said


@needs_hosts
def test_a_run_folder_that_is_not_shared(pair: tuple[Host, ...], folder: Path) -> None:
    (folder / "runs").mkdir(exist_ok=True)
    pair[1].tmpfs(folder / "runs", "8m")
    try:
        assert "train.py: rank 1 on node-b: this folder is missing" in (refused(pair, folder))
        pair[1].shell(f"mkdir {folder}/runs/run")
        said = refused(pair, folder)
        assert "rank 1 on node-b: this folder is not the one that rank 0 sees" in said
        assert f"run.dir={folder}/runs/run" in said
    finally:
        pair[1].shell(f"umount {folder}/runs")
    assert not list((folder / "runs").glob("run/*"))


@needs_hosts
def test_shards_that_one_host_misses(pair: tuple[Host, ...], folder: Path) -> None:
    shards = folder / "shards"
    make_shards(shards, random_images(200), np.arange(200) % 5)
    (folder / "empty").mkdir()
    pair[1].mount(folder / "empty", shards)
    try:
        sources = [f"data.train={shards}/*.tar", "data.holdout=0.2", "data.limit=null"]
        said = refused(pair, folder, "data.source=shards", *sources)
    finally:
        pair[1].shell(f"umount {shards}")
    assert "rank 1 on node-b: a shard cannot be read (No such file or directory)" in said
    assert str(shards) in said


@needs_hosts
def test_software_and_configs_that_differ(pair: tuple[Host, ...], folder: Path) -> None:
    other = folder / "other.py"
    other.write_text("# another version\n")
    pair[1].mount(other, REPOSITORY / "cnn2gnn_dist" / "splitmix.py")
    try:
        said = refused(pair, folder)
    finally:
        pair[1].shell(f"umount {REPOSITORY}/cnn2gnn_dist/splitmix.py")
    assert (
        "train.py: the ranks don't run the same software: cnn2gnn-dist (digest of its files)"
        in said
    )
    assert "on node-b" in said
    said = refused(pair, folder, extra={1: ["teacher.lr=0.5"]})
    assert "rank 1 on node-b were started with different configs: teacher.lr 0.005 and 0.5" in said
    said = refused(pair, folder, extra={1: ["teacher.lr=x"]})
    assert "train.py: rank 1 on node-b: " in said
    assert "teacher.lr" in said


@needs_hosts
def test_interfaces_and_room(pair: tuple[Host, ...], folder: Path) -> None:
    said = refused(pair, folder, own={1: {"GLOO_SOCKET_IFNAME": "eth9"}})
    assert (
        "rank 1 on node-b: GLOO_SOCKET_IFNAME names no network interface of host node-b: eth9"
        in said
    )
    for host, place in zip(pair, ("/dev/shm", "/tmp/home"), strict=True):
        host.tmpfs(Path(place), "1m")
    try:
        served = ["graph.sampling.sampler=distdgl", "graph.sampling.query=table"]
        home = {"HOME": "/tmp/home"}
        said = refused(pair, folder, *served, *REMOTE, "stream.cache_dir=~", **home)
    finally:
        for host, place in zip(pair, ("/dev/shm", "/tmp/home"), strict=True):
            host.shell(f"umount {place}")
    assert "rank 0 on node-a: this folder has 1 MiB free, 32 are needed (/dev/shm)" in said
    assert "rank 1 on node-b: this folder has 1 MiB free, 64 are needed (/tmp/home)" in said


def an_hour_ahead(rank: int) -> None:
    """Hosts share the kernel's clock here, so the process of this one reads a patched clock."""
    if rank == 1:
        real = time.time
        time.time = lambda: real() + 3600


@needs_hosts
def test_a_clock_that_is_ahead(pair: tuple[Host, ...], folder: Path) -> None:
    said = refused(pair, folder, before=an_hour_ahead)
    assert (
        "train.py: the clock of node-b is 3600 s ahead of that of node-a; 60 s are allowed" in said
    )


def with_a_bug(rank: int) -> None:
    """Rank 1 raises in its third step; it says what a lost connection says."""
    if rank == 1:
        real = Engine.step_ahead

        def step_ahead(self: Engine, *arguments: Any, **named: Any) -> Any:
            if self.steps == 2:
                raise ValueError("a bug: Connection refused")
            return real(self, *arguments, **named)

        Engine.step_ahead = step_ahead  # type: ignore[method-assign]


@needs_hosts
def test_a_bug_on_one_rank_is_not_a_lost_rank(pair: tuple[Host, ...], folder: Path) -> None:
    """75 would have a job requeued until it has been in vain 50 times."""
    run = folder / "runs" / "bug"
    found = host_runs.finish(host_runs.start(pair, host_runs.micro(run), before=with_a_bug))
    assert [code for code, _ in found] == [1, 1], found
    assert "train.py: rank 1 on node-b: ValueError: a bug" in found[0][1]
    assert "Traceback" in found[1][1]


def with_a_lost_reader(rank: int) -> None:
    """Rank 1's fourth request is never answered, as when its file server is gone."""
    real, asked = Reader.read, []

    def read(self: Reader, request: Request) -> Any:
        asked.append(request)
        if rank == 1 and len(asked) > 3:
            threading.Event().wait()
        return real(self, request)

    Reader.read = read  # type: ignore[method-assign]


@needs_hosts
def test_files_that_never_come_during_the_run(pair: tuple[Host, ...], folder: Path) -> None:
    """The other ranks end after the timeout, and so does the one that waits; a job would have waited for it."""
    arguments = host_runs.micro(folder / "runs" / "never", "cluster.timeout_s=10")
    found = host_runs.finish(host_runs.start(pair, arguments, before=with_a_lost_reader))
    assert [code for code, _ in found] == [75, 75], found
    assert "did not answer within 10 s: rank 1 on node-b" in found[0][1]
    assert "rank 0 on node-a has not been heard from" in found[1][1]


def briefly(rank: int) -> None:
    """Wait less than the 12 s that a file system normally has to answer."""
    host_checks.ANSWER_S = 1.0


@hosts.needed("bindfs")
@pytest.mark.parametrize("what", ["run.dir", "shards", "cache"])
def test_a_file_server_that_is_gone(pair: tuple[Host, ...], folder: Path, what: str) -> None:
    """Calls into it never return, but the ranks end and name the path. Without the limit they would wait forever."""
    assert host_checks.ANSWER_S + shared_folder.SECONDS < 30
    place, served = folder / f"gone-{what}", folder / f"server-{what}"
    make_shards(served, random_images(8), np.arange(8) % 2)
    hosts.share(served, place, pair[1:])
    pair[1].shell("kill -STOP $(pidof bindfs)")
    given = {
        "run.dir": [f"run.dir={place}/run"],
        "shards": ["data.source=shards", f"data.train={place}/*.tar"],
        "cache": [*REMOTE, f"stream.cache_dir={place}"],
    }
    try:
        said = refused(pair, folder, *given[what], before=briefly)
    finally:
        pair[1].shell(f"kill -CONT $(pidof bindfs); umount {place}")
    assert "train.py: rank 1 on node-b: this file system has not answered for 1 s" in said
    assert f"where:  {place}" in said


def stop_alone(who: int) -> tuple[str, bool]:
    """One rank stops in the middle; the other is told why, not only that it is gone."""
    errors = ErrorExchange()
    collectives.barrier()
    try:
        if collectives.rank() == who:
            raise UserError("a shard is gone", where="shard-3", remedy="restore it")
        collectives.barrier()
    except UserError as error:
        return str(error), errors.publish(error)
    except RuntimeError as error:
        received = errors.received() if collectives.lost_peer(error) else None
        return str(received or error), bool(received and received.shared)
    return "", False


@pytest.mark.parametrize("who", [0, 1])
def test_the_error_of_a_rank_that_stops_alone_is_every_ranks(who: int) -> None:
    found = rank_group.run(stop_alone, 2, who)
    own, other = found[who], found[1 - who]
    assert own[0] == "a shard is gone\n  where:  shard-3\n  remedy: restore it"
    assert other[0].startswith(f"rank {who} on ")
    assert ": a shard is gone" in other[0]
    assert found[1][1]  # rank 0 reports it for both


def folders_of_three_hosts(root: str, folders: str, late: bool) -> tuple[bool | str, list[str]]:
    """Whether hosts a, b and c find their folders separate, or the error; and what is left there.

    Args:
        root: of the hosts' folders.
        folders: the folder of each host.
        late: the third host sees what the second writes only after all have waited for rank 0's file.
    """
    own_folders.believe("abc")
    rank, sees = collectives.rank(), shared_folder._sees
    folder = Path(root) / folders[rank]
    folder.mkdir(exist_ok=True)
    os.chdir(folder)  # as on real hosts, all have the same path
    shared_folder.SECONDS = 0.5

    def sees_late(path: Path) -> bool:
        found = sees(path)
        if rank == 2:
            for name in os.listdir("../b/run"):
                Path("run", name).touch()
        return found

    if late:
        shared_folder._sees = sees_late
    try:
        separate: bool | str = shared_folder.check(Path("run"), may_be_separate=True)
    except UserError as error:
        separate = error.what
    collectives.barrier()
    return separate, [str(path) for path in Path(root).rglob("run*")]


@pytest.mark.parametrize(
    ("folders", "late", "found"),
    [
        ("abc", False, True),
        ("aaa", False, False),
        (
            "abc",
            True,
            "rank 2 on c: this folder is shared with rank 1 on b, but not with all hosts",
        ),
    ],
)
def test_whether_each_host_has_a_folder_of_its_own(
    tmp_path: Path, folders: str, late: bool, found: bool | str
) -> None:
    """A file that another host sees late has existed for as long as every host has waited."""
    assert (
        rank_group.run(folders_of_three_hosts, 3, str(tmp_path), folders, late) == [(found, [])] * 3
    )


def a_store_refuses(who: int) -> tuple[bool, str]:
    """One rank's work fails with an error of the network: whether the others think that it is lost."""
    try:
        with collectives.uneven():
            if collectives.rank() == who:
                raise ConnectionRefusedError(111, "Connection refused")
    except RuntimeError as error:
        return collectives.lost_peer(error), str(error)
    except ConnectionRefusedError as error:
        return False, str(error)
    return False, "nothing"


@pytest.mark.parametrize("who", [0, 1])
def test_another_ranks_network_error_is_not_its_loss(who: int) -> None:
    found = rank_group.run(a_store_refuses, 2, who)
    assert [lost for lost, _ in found] == [False, False]
    assert all("Connection refused" in said for _, said in found)


def each_its_own() -> str:
    def work() -> int:
        raise UserError(f"no room {collectives.rank()}")

    try:
        every_rank(work)
    except UserError as error:
        return error.what
    return ""


def test_errors_of_all_ranks_are_gathered() -> None:
    one, other = rank_group.run(each_its_own, 2)
    assert one == other
    assert "no room 0; rank 1 on " in one
