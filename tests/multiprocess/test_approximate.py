"""The approximate table: across processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support import REPOSITORY, table_searches
from tests.support.forks import Fork
from tests.support.runs import environment
from tests.unit.graph.test_approximate import points


def test_the_same_table_at_any_number_of_ranks_and_after_a_kill(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", points())

    def start(folder: str, rank: int, world_size: int, die_after: int) -> Fork:
        (tmp_path / folder).mkdir(exist_ok=True)
        job = (tmp_path / folder, tmp_path / "z.npy", rank, world_size, die_after)
        return Fork(table_searches.main, job, environment(), REPOSITORY)

    def ends(*ranks: Fork) -> list[str]:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
        assert all(rank.returncode == 0 for rank in ranks), said
        return said

    alone = ends(start("one", 0, 1, 0))[0].split()
    ends(*(start("three", rank, 3, 0) for rank in range(3)))
    done = 13  # units: the lists, five of probes, five of the scan, and two of the sample
    cut = start("cut", 0, 1, done)
    cut.communicate(timeout=300)
    assert cut.returncode == -9
    for stale in (tmp_path / "cut").glob("at-*"):
        stale.unlink()
    again = ends(start("cut", 0, 1, 0))[0].split()
    # The worker threads may be ahead of the counting one when the kill arrives.
    assert 0 < int(again[0]) <= int(alone[0]) - done
    for name in ("table.npy", "order.npy"):
        want = np.load(tmp_path / "one" / name)
        np.testing.assert_array_equal(np.load(tmp_path / "three" / name), want)
        np.testing.assert_array_equal(np.load(tmp_path / "cut" / name), want)
