"""When a link is cut where ranks meet through the store, the ranks on both sides end within the timeout."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cnn2gnn_dist.runtime.group import collectives, exchange, members
from tests.support import host_runs, hosts
from tests.support.hosts import Host

pytestmark = hosts.needed()

TIMEOUT_S = 4.0
FOREVER_S = 120.0
"""Only a rank that waits in vain takes this long: the kernel gives up a connection after 15 minutes."""

folder, pair = hosts.fixtures()


def meeting(folder: Path, where: str) -> tuple[str, bool]:
    """How a meeting of ranks ends if a link is cut before this rank arrives, while it works, or while it waits."""
    rank = collectives.rank()
    errors = exchange.ErrorExchange()

    def reached() -> None:
        (folder / f"ready-{rank}").touch()
        assert members.wait_until((folder / "cut").exists, FOREVER_S)

    collectives.barrier()
    try:
        if where == "before":
            reached()
        with collectives.uneven():
            if (
                where == "inside"
                or (where == "rank 0 works" and rank == 0)
                or (where == "rank 1 works" and rank == 1)
            ):
                reached()
            else:
                (folder / f"ready-{rank}").touch()
        collectives.broadcast_object("done")
    except RuntimeError as error:
        return errors.silent(), collectives.lost_peer(error)
    return "", False


@pytest.mark.parametrize("where", ["before", "inside", "rank 0 works", "rank 1 works"])
def test_a_cut_where_ranks_meet(pair: tuple[Host, ...], folder: Path, where: str) -> None:
    place = folder / where.replace(" ", "-")
    place.mkdir()

    def cut() -> None:
        ready = [place / f"ready-{rank}" for rank in range(2)]
        if members.wait_until(lambda: all(path.exists() for path in ready), FOREVER_S):
            pair[1].cut()
            (place / "cut").touch()

    cutting = threading.Thread(target=cut)
    cutting.start()
    try:
        found = host_runs.call(
            pair, place / "job", meeting, place, where, seconds=FOREVER_S, timeout_s=TIMEOUT_S
        )
    finally:
        cutting.join()
        pair[1].restore()
    assert [one.value for one in found] == [
        ("rank 1 on node-b", True),
        ("rank 0 on node-a", True),
    ], "\n".join(one.output for one in found)
