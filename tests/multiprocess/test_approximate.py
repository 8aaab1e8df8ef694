"""The approximate table: across processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.support import REPOSITORY
from tests.unit.graph.test_approximate import points


def test_the_same_table_at_any_number_of_ranks_and_after_a_kill(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", points())

    def start(folder: str, rank: int, world_size: int, die_after: int) -> subprocess.Popen[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [
            sys.executable,
            str(REPOSITORY / "tests/support/table_searches.py"),
            str(tmp_path / folder),
        ]
        return subprocess.Popen(
            [*command, str(tmp_path / "z.npy"), str(rank), str(world_size), str(die_after)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def ends(*ranks: subprocess.Popen[str]) -> list[str]:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
        assert all(rank.returncode == 0 for rank in ranks)
        return said

    alone = ends(start("one", 0, 1, 0))[0].split()
    ends(*(start("three", rank, 3, 0) for rank in range(3)))
    done = 13  # lists, five of probes, five of the scan, and two of the sample's
    cut = start("cut", 0, 1, done)
    cut.communicate(timeout=300)
    assert cut.returncode == -9
    for stale in (tmp_path / "cut").glob("at-*"):
        stale.unlink()
    again = ends(start("cut", 0, 1, 0))[0].split()
    # The worker threads may be further than the counting one when the kill arrives.
    assert 0 < int(again[0]) <= int(alone[0]) - done
    for name in ("table.npy", "order.npy"):
        want = np.load(tmp_path / "one" / name)
        np.testing.assert_array_equal(np.load(tmp_path / "three" / name), want)
        np.testing.assert_array_equal(np.load(tmp_path / "cut" / name), want)
