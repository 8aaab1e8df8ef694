"""Runs on two hosts give the results of one host, whatever the file server's clients cache and the link does."""

from __future__ import annotations

import time
from pathlib import Path

from cnn2gnn_dist.errors import PeerLost
from cnn2gnn_dist.runtime.group import members
from tests.support import host_runs, hosts, runs
from tests.support.forks import Fork
from tests.support.hosts import Host
from tests.support.watching import reach

pytestmark = hosts.needed("bindfs")

LOST_S = 20
"""Seconds without an answer after which a rank counts as lost: more than a rank takes on a loaded machine."""
CACHED_S = 8.0
"""As long as a stage of this run: what a host has seen in one stage is still cached in the next."""


PLACES = {
    "teacher": 1,
    "targets": "targets/begin.json",
    "refresh": "student/graph/*.tmp",
    "student": 13,  # after the refresh
}
"""Places in a run: the step of a training, or a file that shows that one has begun."""


def with_a_file_server(pair: tuple[Host, ...], folder: Path) -> None:
    hosts.share(folder / "server", folder / "shared", pair, CACHED_S)


folder, pair = hosts.fixtures(with_a_file_server)


def arrays(run: Path) -> dict[str, bytes]:
    """Everything that was computed, by path: rows of graphs, their partitions, targets, predictions."""
    found = {}
    for pattern in ("**/*.npy", "targets/**/*.parquet", "evaluation/*.npz"):
        for path in sorted(run.glob(pattern)):
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def test_a_run_over_clients_with_caches_of_their_own(
    pair: tuple[Host, ...], folder: Path, micro_run: Path
) -> None:
    arguments = host_runs.micro(folder / "shared" / "run")
    for code, output in host_runs.finish(host_runs.start(pair, arguments)):
        assert code == 0, output[-4000:]
    run = folder / "server" / "run"
    assert runs.trail(run) == runs.trail(micro_run)
    assert runs.scores(run) == runs.scores(micro_run)
    made, wanted = arrays(run), arrays(micro_run)
    assert made.keys() == wanted.keys()
    assert [name for name in made if made[name] != wanted[name]] == []


def test_a_link_that_is_cut_for_a_while_and_one_that_stays_cut(
    pair: tuple[Host, ...], folder: Path, micro_run: Path
) -> None:
    """A cut of 8 s costs nothing; after the timeout both ranks end and name the other; the same command resumes.

    Also checked: nothing listens beyond loopback and the given network.
    """
    run = folder / "cut"
    chosen = ["--stages", "pack,index,teacher"]
    whole = [*host_runs.micro(run), *chosen]
    ranks = host_runs.start(pair, [*whole, "cluster.timeout_s=60"])
    reach(ranks[0], run, "teacher", 1)
    for host in pair:
        assert hosts.listening(host) - {"127.0.0.1"} == {host.address}
    pair[1].cut()
    time.sleep(8)  # the length of the fault
    pair[1].restore()
    for code, output in host_runs.finish(ranks):
        assert code == 0, output[-4000:]
    assert runs.trail(run, ("teacher",)) == runs.trail(micro_run, ("teacher",))

    run = folder / "lost"
    whole = [*host_runs.micro(run), *chosen]
    ranks = host_runs.start(pair, [*whole, f"cluster.timeout_s={LOST_S}"], port=29_501)
    reach(ranks[0], run, "teacher", 6)
    pair[1].cut()
    ended = host_runs.finish(ranks)
    pair[1].restore()
    for (code, output), other in zip(ended, ("rank 1 on node-b", "rank 0 on node-a"), strict=True):
        assert code == PeerLost.exit_code, output[-4000:]
        assert f"another rank died, or did not answer within {LOST_S} s: {other}" in output
    for code, output in host_runs.finish(host_runs.start(pair, whole, port=29_502)):
        assert code == 0, output[-4000:]
    assert runs.trail(run, ("teacher",)) == runs.trail(micro_run, ("teacher",))


def test_dgls_servers_listen_on_the_network_given(pair: tuple[Host, ...], folder: Path) -> None:
    run = folder / "served"
    served = ["graph.sampling.sampler=distdgl", "graph.sampling.query=table", "student.epochs=2"]
    ranks = host_runs.start(pair, host_runs.micro(run, *served), port=29_530)
    try:
        reach(
            ranks[0], run, "student", 15
        )  # epochs of 9 steps; the graph is used from the second on
        found = [hosts.listening(host) - {"127.0.0.1"} for host in pair]
        assert found == [{host.address} for host in pair]
    finally:
        for rank in ranks:
            hosts.end_family(rank)


def reach_place(rank: Fork, run: Path, place: str) -> None:
    """Wait until a run is at one of ``PLACES``."""
    begun = PLACES[place]
    if isinstance(begun, int):
        reach(rank, run, place, begun)
    else:
        assert members.wait_until(lambda: any(run.glob(begun)), 400, 0.002), place


def cut_at(pair: tuple[Host, ...], folder: Path, seconds: dict[str, float], port: int) -> Path:
    """A run whose link is cut for that long in each of ``PLACES``; returns its folder."""
    run = folder / f"cut-{port}"
    ranks = host_runs.start(pair, host_runs.micro(run), port=port)
    for place, length in seconds.items():
        reach_place(ranks[0], run, place)
        pair[1].cut()
        time.sleep(length)  # of the fault
        pair[1].restore()
    for code, output in host_runs.finish(ranks, 600):
        assert code == 0, output[-4000:]
    return run


def test_cuts_shorter_than_the_timeout_cost_nothing_anywhere(
    pair: tuple[Host, ...], folder: Path, micro_run: Path
) -> None:
    """The default of ``cluster.timeout_s`` is 120; TCP asks again at ever longer intervals, after 51 and 102 s."""
    run = cut_at(pair, folder, {"teacher": 40, "targets": 8, "refresh": 8, "student": 90}, 29_540)
    assert runs.trail(run) == runs.trail(micro_run)
    assert runs.scores(run) == runs.scores(micro_run)


def test_a_link_that_stays_cut_anywhere_ends_both_ranks(
    pair: tuple[Host, ...], folder: Path, micro_run: Path
) -> None:
    """After cuts in targets, a refresh and the student's training, the same command gives bit-identical results."""
    run = folder / "anywhere"
    command = host_runs.micro(run, f"cluster.timeout_s={LOST_S}")
    for number, place in enumerate(["targets", "refresh", "student"]):
        ranks = host_runs.start(pair, command, port=29_510 + number)
        reach_place(ranks[0], run, place)
        pair[1].cut()
        ended = host_runs.finish(ranks)
        pair[1].restore()
        assert [code for code, _ in ended] == [PeerLost.exit_code] * 2, (place, ended)
        for (_, output), other in zip(ended, ("rank 1 on node-b", "rank 0 on node-a"), strict=True):
            assert f"did not answer within {LOST_S} s: {other}" in output, (place, output[-3000:])
    for code, output in host_runs.finish(host_runs.start(pair, command, port=29_520)):
        assert code == 0, output[-4000:]
    assert runs.trail(run) == runs.trail(micro_run)
    assert runs.scores(run) == runs.scores(micro_run)
