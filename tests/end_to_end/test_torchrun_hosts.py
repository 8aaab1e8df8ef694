"""torchrun on two hosts with --max-restarts: a rank that is killed, and a link cut for longer than the timeout."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from tests.support import host_runs, hosts, runs
from tests.support.hosts import Host
from tests.support.watching import reach

pytestmark = hosts.needed()

folder, pair = hosts.fixtures()

LOST_S = 20


def agents(pair: tuple[Host, ...], run: Path) -> list[subprocess.Popen[str]]:
    """One torchrun on each host, which meet on the first."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{pair[0].address}:29400"]
    command = [str(runs.BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", *meeting]
    command += ["--max-restarts", "3", "launch/train.py"]
    command += [*host_runs.micro(run), f"cluster.timeout_s={LOST_S}"]
    return [host.start(command, runs.environment(HOME="/tmp/home")) for host in pair]


def rank_of(agent: subprocess.Popen[str]) -> psutil.Process:
    """The only rank of an agent, which runs in the host's own PID namespace."""
    family = psutil.Process(agent.pid).children(recursive=True)
    return next(one for one in family if one.cmdline()[1:3] == ["-u", "launch/train.py"])


def test_the_agents_restart_ranks_that_are_killed_or_cut_off(
    pair: tuple[Host, ...], folder: Path, micro_run: Path
) -> None:
    """The ranks resume by themselves each time; the run ends with bit-identical results."""
    run = folder / "restarted"
    started = agents(pair, run)
    try:
        reach(started[0], run, "teacher")  # there is nothing to resume before its first checkpoint
        rank_of(started[1]).kill()
        reach(started[0], run, "student")
        pair[1].cut()
        time.sleep(2 * LOST_S)  # the length of the fault
        pair[1].restore()
        ended = [runs.finish(agent) for agent in started]
    finally:
        pair[1].restore()
        for agent in started:
            hosts.end_family(agent)
    for code, output in ended:
        assert code == 0, output[-4000:]
    assert sum(output.count("resumes at epoch") for _, output in ended) >= 2
    assert runs.trail(run) == runs.trail(micro_run)
    assert runs.scores(run) == runs.scores(micro_run)
