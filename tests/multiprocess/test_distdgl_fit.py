"""What DistDGL requires of a run, checked before it starts; its numbering of nodes."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest

from cnn2gnn_dist import settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.distdgl.server import new_of_old, node_ranges
from cnn2gnn_dist.graph.partition.parts import new_ids
from cnn2gnn_dist.graph.version import open_version
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.runtime.supervisor import SupervisedProcesses
from cnn2gnn_dist.stages.neighbours.served_graph import hosts_in_conflict, serve
from cnn2gnn_dist.stages.shared import preflight
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from tests.support import rank_group
from tests.support.distdgl import M, N, make_version, needs_namespaces

SERVED = ["graph.sampling.sampler=distdgl", "graph.sampling.query=table"]


def test_ids_are_numbered_part_by_part():
    part_N = np.array([1, 0, 1, 0, 0])
    assert node_ranges(part_N, 3).tolist() == [[0, 3], [3, 5], [5, 5]]
    np.testing.assert_array_equal(new_of_old(part_N)[new_ids(part_N)], np.arange(5))
    assert new_of_old(part_N).tolist() == [3, 0, 4, 1, 2]


def test_what_servers_cannot_do_is_refused_before_the_run():
    with pytest.raises(UserError, match=r"sampler=distdgl needs query=table"):
        settings.load("demo", ["graph.sampling.sampler=distdgl"])
    with pytest.raises(UserError, match=r"second_hop=sampled"):
        settings.load("demo", [*SERVED, "graph.sampling.second_hop=cached"])
    config = settings.load("demo", [*SERVED, "graph.partition.parts=4"])
    with pytest.raises(UserError, match="4 partitions for 2 ranks"):
        preflight.check(config, ["student"], 2)


@pytest.mark.parametrize(("hosts", "can", "named"), [
    (["a", "a"], [True, True], []),
    (["a", "a"], [True, False], ["a"]),
    (["a", "b"], [False, False], []),
    (["a", "b", "b"], [False, False, True], ["b"]),
])  # fmt: skip
def test_ranks_that_share_a_host_need_namespaces(hosts, can, named):
    assert hosts_in_conflict(list(zip(hosts, can, strict=True))) == named


def test_a_rank_listens_where_it_faces_rank_0():
    assert Ranks(master_addr="127.0.0.1").own_address() == "127.0.0.1"
    with pytest.raises(UserError, match="rank 0 can't be reached"):
        Ranks(master_addr="no.such.host.invalid").own_address()


def serving_case(root: str, version: str, fault: str) -> str:
    """What ``serve`` raises on this rank if rank 1 alone has a fault, and what it leaves running."""
    rank = collectives.rank()
    config = settings.load("demo", [f"run.dir={root}", *SERVED])
    meeting = "no.such.host.invalid" if rank and fault == "address" else "127.0.0.1"
    ranks = Ranks(rank, rank, collectives.world_size(), master_addr=meeting)
    folder = Path(root) / "student"
    here = Context(config, ranks, RunPaths(Path(root)), folder, "key", "cpu", False)
    if rank and fault == "start":
        started, calls = SupervisedProcesses.started, [0]

        def refused(self: SupervisedProcesses) -> bool:
            calls[0] += 1
            return started(self) and calls[0] == 1  # the first one asks whether it may

        SupervisedProcesses.started = refused  # type: ignore[method-assign]
    try:
        serve(here, open_version(Path(version)))
    except UserError as error:
        names = [p.name() for p in psutil.Process().children(recursive=True)] if not rank else []
        return f"{error.what} {names}"
    return "it serves"


def contested_case(root: str, version: str) -> list[int]:
    """The neighbors that a rank's servers know, if other processes look for ports before its server listens."""
    rank, started, taken = collectives.rank(), SupervisedProcesses.started, []
    config = settings.load("demo", [f"run.dir={root}", *SERVED])
    ranks = Ranks(rank, rank, collectives.world_size(), master_addr="127.0.0.1")
    folder = Path(root) / "student"
    here = Context(config, ranks, RunPaths(Path(root)), folder, "key", "cpu", False)

    def contested(self: SupervisedProcesses) -> bool:
        for line in (folder / "distdgl" / f"rank-{rank:02d}").glob("servers.txt"):
            other = socket.socket()
            with contextlib.suppress(OSError):
                other.bind(("127.0.0.1", int(line.read_text().splitlines()[rank].split()[1])))
                taken.append(other)  # for good
        return started(self)

    SupervisedProcesses.started = contested  # type: ignore[method-assign]
    served = serve(here, open_version(Path(version)))
    found = served.neighbours(np.arange(N), M, epoch=0, step=0, hop=1, rank=rank)
    collectives.barrier()
    served.close()
    assert not taken
    return (found >= 0).sum(1).tolist()


@needs_namespaces
def test_the_port_of_a_server_is_its_own_from_the_moment_that_all_know_it(tmp_path):
    """DGL's server listens seconds later: until then any connection of this host could have got it."""
    version = make_version(tmp_path, 2)
    wanted = (np.asarray(version.candidates) >= 0).sum(1).tolist()
    assert rank_group.run(contested_case, 2, str(tmp_path), str(version.path)) == [wanted] * 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("address", "rank 1 on {}: rank 0 can't be reached"),
        pytest.param("start", "rank 1 on {}: this kernel refuses", marks=needs_namespaces),
    ],
)
def test_what_keeps_one_rank_from_serving_ends_all_at_once(tmp_path, fault, words):
    """DGL's servers wait minutes for the missing one."""
    version = make_version(tmp_path, 2)
    told = rank_group.run(serving_case, 2, str(tmp_path), str(version.path), fault, timeout=240)
    for text in told:
        assert words.format(socket.gethostname()) in text
        assert text.endswith(" []")
