"""DistDGL's servers: two machines on one host, each with its server, its client and its /dev/shm."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from cnn2gnn_dist.errors import PeerLost
from cnn2gnn_dist.graph import bank
from cnn2gnn_dist.graph.sampler import TableSampler
from cnn2gnn_dist.runtime.group import members
from tests.support.blocks import sampled_block
from tests.support.distdgl import D, M, N, make_version, needs_namespaces, serving
from tests.support.runs import (
    MICRO,
    copy_before,
    environment,
    finish,
    launch,
    lines,
    ray_environment,
    results,
    start,
)
from tests.support.watching import ranks_of, reach

pytestmark = [needs_namespaces]
KEY = {"epoch": 1, "step": 2, "hop": 1, "rank": 0}
SERVED = ["graph.sampling.sampler=distdgl", "graph.sampling.query=table"]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A version, and the two machines that serve it."""
    root = tmp_path_factory.mktemp("served")
    version = make_version(root, 2)
    before = left_in_memory()
    with serving(version, root) as machines:
        yield version, machines
        family = [psutil.Process(p) for machine in machines for p in machine.processes.values()]
    assert not any(process.is_running() for process in family)
    assert members.wait_until(lambda: left_in_memory() <= before, 60.0), left_in_memory() - before


def left_in_memory() -> set[str]:
    """Files in shared memory, except for semaphores of tests that run at the same time, which others create, too."""
    passing = ("sem.mp-", "sem.loky-")
    return {name for name in os.listdir("/dev/shm") if not name.startswith(passing)}


def packed(table: np.ndarray) -> np.ndarray:
    """Rows with their empty cells moved to the end."""
    return np.take_along_axis(table, np.argsort(table < 0, axis=1, kind="stable"), 1)


@pytest.mark.parametrize("machine", [0, 1])
def test_all_neighbours_are_the_tables(graph, machine):
    """Local and remote ones, in table order, including a node without any."""
    version, machines = graph
    nodes = np.random.default_rng(machine).permutation(N)
    got = machines[machine].neighbours(nodes, M + 3, **KEY)
    np.testing.assert_array_equal(got, packed(np.asarray(version.candidates))[nodes])


@pytest.mark.parametrize("machine", [0, 1])
def test_sampled_neighbours_are_distinct_candidates_in_order(graph, machine):
    version, machines = graph
    nodes = np.arange(N).repeat(2)
    got = machines[machine].neighbours(nodes, 3, **KEY)
    table = packed(np.asarray(version.candidates))
    np.testing.assert_array_equal(got[::2], got[1::2])  # each was asked for twice
    for node, row in zip(nodes[::2], got[::2], strict=True):
        there = table[node][table[node] >= 0]
        assert (row >= 0).sum() == min(3, len(there))
        place = [list(there).index(c) for c in row[row >= 0]]
        assert place == sorted(set(place))
    seen = [machines[machine].neighbours(nodes, 3, **(KEY | {"step": s})) for s in range(30)]
    assert {*np.unique(np.stack(seen))} >= {*np.unique(table[table >= 0])}  # every one is drawn


def test_a_machine_repeats_what_it_draws_from_its_own_partition(graph):
    version, machines = graph
    own = np.flatnonzero(np.asarray(version.part) == 1)
    first, again, other = (
        machines[1].neighbours(own, 3, **(KEY | {"step": step})) for step in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("machine", [0, 1])
def test_rows_are_the_versions(graph, machine):
    version, machines = graph
    nodes = np.random.default_rng(3).integers(0, N, 500)
    x, z, labels = machines[machine].rows(nodes)
    np.testing.assert_array_equal(x.numpy(), version.x[nodes])
    np.testing.assert_array_equal(z.numpy(), version.z[nodes])
    np.testing.assert_array_equal(labels.numpy(), version.labels[nodes])
    assert [len(part) for part in machines[machine].rows(nodes[:0])] == [0, 0, 0]


def test_blocks_are_those_of_the_table_sampler(graph):
    """With all neighbors: the block around a partition's seed nodes, including features."""
    version, machines = graph
    whole = bank.load_bank(version, None)
    table = TableSampler(packed(np.asarray(version.candidates)), 0)
    for part, machine in enumerate(machines):
        seeds = machine.local_of(np.flatnonzero(np.asarray(version.part) == part)[::3])
        key = {"epoch": 0, "step": 0, "rank": 0}
        got, want = (sampled_block(s, seeds, (M, M), **key) for s in (machine, table))
        for name in ("nodes_V", "first_U", "row_of_BF", "second_UG", "seed_B"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
        x_VD, _, _ = machine.rows(got.nodes_V)
        assert x_VD.shape == (len(got.nodes_V), D)
        assert (x_VD == whole.x_LD[got.nodes_V]).all()


def test_a_seed_of_another_partition_is_refused(graph):
    version, machines = graph
    with pytest.raises(KeyError, match="outside the partition"):
        machines[0].local_of(np.flatnonzero(np.asarray(version.part) == 1)[:3])


def test_servers_and_clients_listen_on_the_given_address_only(graph):
    _, machines = graph
    heard = []
    for machine in machines:
        for pid in machine.processes.values():
            sockets = psutil.Process(pid).net_connections("inet")
            heard += [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN]
    assert heard
    assert set(heard) == {"127.0.0.1"}


@pytest.mark.parametrize("victim", ["server", "client"])
def test_a_lost_process_is_a_named_error_on_every_rank(victim, tmp_path):
    """Its own rank notices at once, the other when a request times out."""
    version = make_version(tmp_path, 2)
    with serving(version, tmp_path, timeout_s=4) as machines:
        os.kill(machines[1].processes[victim], signal.SIGKILL)
        expected = rf"lost at partition 1: {victim} was killed by signal 9"
        with pytest.raises(PeerLost, match=expected) as mine:
            ask_on(machines[1])
        assert mine.value.exit_code == 75
        with pytest.raises(PeerLost, match="lost at partition 0"):
            machines[0].neighbours(np.arange(N), 3, **KEY)


def test_a_client_that_queries_a_lost_server_says_that_the_loss_is_elsewhere(tmp_path):
    """Between two requests: then the client is aborted by its next one, instead of waiting for an answer."""
    version = make_version(tmp_path, 2)
    with serving(version, tmp_path, timeout_s=30) as machines:
        for machine in machines:
            machine.neighbours(np.arange(N), 3, **KEY)
        lost = psutil.Process(machines[1].processes["server"])
        lost.kill()
        assert not psutil.wait_procs([lost], timeout=30)[1]
        with pytest.raises(PeerLost, match="partition 1: server was killed by signal 9"):
            ask_on(machines[1])
        with pytest.raises(PeerLost, match=r"partition 0: client .* signal 6: a server that it"):
            ask_on(machines[0])


def test_a_silent_server_is_lost_after_the_timeout(tmp_path):
    """A rank that needs it reports it; its own rank, which reads its shared memory, does not notice."""
    version = make_version(tmp_path, 2)
    with serving(version, tmp_path, timeout_s=4) as machines:
        os.kill(machines[1].processes["server"], signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(PeerLost, match="partition 0: the client did not answer within 4 s"):
            machines[0].neighbours(np.arange(N), 3, **KEY)
        assert time.monotonic() - began >= 4


def test_a_lost_server_and_a_killed_rank_end_a_launch_and_the_same_command_continues(
    micro_run, tmp_path
):
    """A lost server ends the launch at once, even if its rank waits in a collective for one that waits for it.
    After SIGKILL to a rank, its server and client exit, and the other rank reports its loss and exits.
    """
    run = tmp_path / "run"
    copy_before(micro_run, run, "student")
    command = launch(run, *SERVED, "graph.refresh_epochs=9", "student.control=false")
    process = start(command, environment())  # cluster.timeout_s: two minutes
    reach(process, run, "student", 11)
    one_of(process, "distdgl.server").kill()
    code, output = finish(process)
    assert code != 0
    assert re.search(r"DistDGL was lost at partition \d: server was killed by signal 9", output)
    assert re.search(r"exitcode +: 75", output), output

    last = lines(run / "student")[-1]["step"]
    process = start([*command, "cluster.timeout_s=20"], environment())
    reach(process, run, "student", last + 2)
    ranks = ranks_of(process)
    family = [child for rank in ranks for child in rank.children(recursive=True)]
    assert len(parts_of(family, "distdgl.server")) == 2
    ranks[1].kill()
    code, output = finish(process)
    assert code != 0, output
    assert re.search(r"student +resumes at epoch", output)
    assert not psutil.wait_procs(family, timeout=60)[1]

    code, output = finish(start(command, environment()))
    assert code == 0, output[-4000:]
    assert re.search(r"student +resumes at epoch", output)
    assert results(run)["student"]["accuracy"] > 0.2


@pytest.mark.ray
def test_under_ray_the_group_starts_again_by_itself(micro_run, tmp_path):
    run = tmp_path / "run"
    copy_before(micro_run, run, "student")
    command = [sys.executable, "-m", "cnn2gnn_dist", "student", "--config", "demo", *MICRO, *SERVED]
    command += [f"run.dir={run}", "cluster.timeout_s=20", "graph.refresh_epochs=9"]
    process = start(command, ray_environment())
    reach(process, run, "student", 11)
    one_of(process, "distdgl.client").kill()
    code, output = finish(process)
    assert code == 0, output[-4000:]
    assert "a rank was lost" in output
    assert re.search(r"student +resumes at epoch", output)


def ask_on(machine) -> None:
    """Ask until the server's exit is noticed, which takes a while: its machine's shared memory still exists."""
    while True:
        machine.neighbours(np.arange(N), 3, **KEY)


def one_of(process, module: str) -> psutil.Process:
    """A server or client among a launch's descendants."""
    return parts_of(psutil.Process(process.pid).children(recursive=True), module)[0]


def parts_of(family: list[psutil.Process], module: str) -> list[psutil.Process]:
    """The processes that run this module."""
    found = []
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has exited since
            if one.cmdline()[2:3] == [f"cnn2gnn_dist.graph.{module}"]:
                found.append(one)
    return found


def test_a_truncated_partition_is_named(tmp_path):
    version = make_version(tmp_path, 2)
    path = version.path / "part-01" / "table.npy"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PeerLost, match=r"partition [01]"), serving(version, tmp_path):
        raise AssertionError("it was served")
    said = "".join(log.read_text() for log in Path(tmp_path).glob("machine*/log.txt"))
    assert "part-01" in said
