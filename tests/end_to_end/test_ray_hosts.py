"""A Ray cluster of two hosts: a package missing on one is reported, and a run survives the death of the head."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnn2gnn_dist.runtime.group import members
from tests.support import REPOSITORY, host_runs, hosts, ray_hosts, runs
from tests.support.hosts import Host
from tests.support.watching import reach

pytestmark = [hosts.needed(), pytest.mark.ray]

folder, pair = hosts.fixtures()

ON_BOTH = ["run.ranks=2", "cluster.strategy=STRICT_SPREAD"]


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


def test_the_death_of_the_head(pair: tuple[Host, ...], folder: Path, micro_run: Path) -> None:
    """The driver ends, and no rank stays; on a new cluster the same command gives bit-identical results."""
    run = folder / "headless"
    arguments = [*host_runs.micro(run, *ON_BOTH)]
    with ray_hosts.started(pair, folder, (1, 1)) as cluster:
        driver = cluster.run(*arguments)
        reach(driver, run, "teacher", 5)
        pair[0].shell("pkill -KILL gcs_server")
        code, output = runs.finish(driver)
        assert code != 0, output[-4000:]  # Ray itself ends a driver that has lost its head
        assert "Failed to connect to GCS" in output

    def gone(host: Host) -> bool:
        return host.run(["pgrep", "-f", "ray::.*[Rr]ank"], capture_output=True).returncode == 1

    assert members.wait_until(lambda: all(map(gone, pair)), 120)
    with ray_hosts.started(pair, folder, (1, 1)) as cluster:
        code, output = runs.finish(cluster.run(*arguments))
    assert code == 0, output[-4000:]
    assert "resumes at epoch" in output
    assert runs.trail(run) == runs.trail(micro_run)
