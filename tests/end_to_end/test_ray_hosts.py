"""A Ray of two hosts: what one of them lacks is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import REPOSITORY, host_runs, hosts, ray_hosts, runs
from tests.support.hosts import Host

pytestmark = [hosts.needed(), pytest.mark.ray]

folder, pair = hosts.fixtures()

ON_BOTH = ["run.ranks=2", "cluster.strategy=STRICT_SPREAD"]


def test_the_package_is_missing_on_one_host(pair: tuple[Host, ...], folder: Path) -> None:
    run, absent = folder / "missing", folder / "absent"
    absent.mkdir()
    # Not just an empty folder: Python would go on to a copy that is installed elsewhere.
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
    assert "cnn2gnn submit --send-package" in output  # after what Ray itself prints of it
    assert not (run / "teacher").exists()
