"""A Ray cluster of two hosts: a package that one lacks is named; a run survives the loss of the head and of a host."""

from __future__ import annotations

import re
from pathlib import Path
from subprocess import Popen

import pytest

from cnn2gnn_dist.runtime.group import members
from tests.support import REPOSITORY, host_runs, hosts, ray_hosts, runs
from tests.support.hosts import Host
from tests.support.watching import reach, read_until

pytestmark = [hosts.needed(), pytest.mark.ray]

folder, pair = hosts.fixtures()

ON_BOTH = ["run.ranks=2", "cluster.strategy=STRICT_SPREAD"]
LOST_S = 20
"""Seconds without an answer after which a rank counts as lost: more than a rank takes on a loaded machine."""


def test_the_package_is_missing_on_one_host(pair: tuple[Host, ...], folder: Path) -> None:
    run, absent = folder / "missing", folder / "absent"
    absent.mkdir()
    # Not just an empty folder: Python would fall back to a copy that is installed elsewhere.
    text = "raise ModuleNotFoundError(\"No module named 'cnn2gnn_dist'\")\n"
    (absent / "__init__.py").write_text(text)
    pair[1].mount(absent, REPOSITORY / "cnn2gnn_dist")
    try:
        with ray_hosts.started(pair, folder, (1, 1)) as cluster:
            code, output = runs.finish(cluster.run(*host_runs.micro(run, *ON_BOTH)))
    finally:
        pair[1].shell(f"umount {REPOSITORY}/cnn2gnn_dist")
    assert code == 2, output[-4000:]
    assert (
        "this package can't be imported on node-b: ModuleNotFoundError: No module named" in output
    )
    assert "cnn2gnn submit --send-package" in output  # after what Ray itself prints about it
    assert not (run / "teacher").exists()


def check_listeners(pair: tuple[Host, ...]) -> None:
    """The sockets of a rank (store, gloo) are on the private network; on every address there is only Ray's server."""
    for host in pair:
        found = [one for one in hosts.listeners(host) if one.process == "ray::_Rank"]
        own = [one for one in found if one.port not in ray_hosts.WORKER_PORTS]
        assert {one.address for one in own} == {host.address}, found
        assert len(found) > len(own)  # which the port tells apart


def lose_in_a_refresh(driver: Popen[str], run: Path, host: Host) -> str:
    """Take the power from a host while a graph is built; returns what the driver says until it has noticed."""
    begun = lambda: any(run.glob("student/graph/*.tmp")) or driver.poll() is not None  # noqa: E731
    assert members.wait_until(begun, 400, 0.002)
    host.lose_power()
    return read_until(driver, "a rank was lost")


def test_the_head_dies_and_then_a_host_that_returns(
    pair: tuple[Host, ...], folder: Path, micro_run: Path
) -> None:
    """With the head the driver ends, and no rank stays; the same command continues on a new cluster. There a host
    loses its power during a refresh, and the run waits for it. It ends with bit-identical results.
    """
    run = folder / "headless"
    arguments = [*host_runs.micro(run, *ON_BOTH), f"cluster.timeout_s={LOST_S}"]
    with ray_hosts.started(pair, folder, (1, 1)) as cluster:
        driver = cluster.run(*arguments)
        reach(driver, run, "teacher")  # from here on there is something to resume
        check_listeners(pair)
        pair[0].shell("pkill -KILL gcs_server")
        code, output = runs.finish(driver)
        assert code != 0, output[-4000:]  # Ray itself ends a driver that has lost its head
        assert "Failed to connect to GCS" in output

    def gone(host: Host) -> bool:
        return host.run(["pgrep", "-f", "ray::.*[Rr]ank"], capture_output=True).returncode == 1

    assert members.wait_until(lambda: all(map(gone, pair)), 120)
    with ray_hosts.started(pair, folder, (1, 1)) as cluster:
        driver = cluster.run(*arguments)
        # The ranks notice the head's loss within a second; a fast machine has then finished the teacher.
        read_until(driver, "resumes at epoch|teacher +complete, skipped")
        lose_in_a_refresh(driver, run, pair[1])
        pair[1].restore()
        cluster.start_node(pair[1], 1)
        code, output = runs.finish(driver)
    assert code == 0, output[-4000:]
    assert runs.trail(run) == runs.trail(micro_run)
    assert runs.scores(run) == runs.scores(micro_run)


def test_a_host_that_is_lost_in_a_refresh_for_good(
    pair: tuple[Host, ...], folder: Path, micro_run: Path
) -> None:
    """The run continues with the rank that is left, from the last checkpoint."""
    run = folder / "fewer"
    runs.copy_before(micro_run, run, "student")
    fewer = ["cluster.min_ranks=1", "cluster.wait_s=1", f"cluster.timeout_s={LOST_S}"]
    with ray_hosts.started(pair, folder, (1, 1)) as cluster:
        driver = cluster.run(*host_runs.micro(run, *ON_BOTH, *fewer))
        try:
            noticed = lose_in_a_refresh(driver, run, pair[1])
            code, output = runs.finish(driver)
        finally:
            pair[1].restore()
    assert code == 0, output[-4000:]
    assert "there is room for 1 of 2 ranks: the run continues with 1" in output
    # The other rank names the host if it misses its peer before Ray does; otherwise Ray's list of nodes does.
    assert re.search(r"a rank was lost \(.*rank \d on node-b|; lost: node-b", noticed + output), (
        noticed
    )
    resumed = int(re.findall(r"student +resumes at epoch .*\(step (\d+)\)", output)[-1])
    found, wanted = runs.lines(run / "student"), runs.lines(micro_run / "student")
    assert 0 < resumed < wanted[-1]["step"]
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    whole = [line for line in wanted if line["step"] <= resumed]
    assert found[: len(whole)] == whole
    # Sums over one rank are those over two in another order.
    for one, other in zip(found[len(whole) :], wanted[len(whole) :], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
