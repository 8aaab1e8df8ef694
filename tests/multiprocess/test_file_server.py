"""Files that one host writes and another reads, over a file server whose clients have their own caches."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.search.work_units import RankGroup, WorkFolder, row_ranges
from cnn2gnn_dist.runtime.group import collectives, members
from cnn2gnn_dist.runtime.shared_files import handover
from tests.support import host_runs, hosts
from tests.support.hosts import Host

pytestmark = hosts.needed("bindfs")

ROWS, WIDTH, UNIT = 4000, 20, 100
"""Units of 8,000 bytes: their boundaries are inside pages."""


def with_file_servers(pair: tuple[Host, ...], folder: Path) -> None:
    hosts.share(folder / "server", folder / "shared", pair, cached_s=2)
    hosts.share(folder / "server", folder / "stale", pair, cached_s=600, reopened=False)


folder, pair = hosts.fixtures(with_file_servers)


def group_of_ranks(forget: bool) -> RankGroup:
    return RankGroup(
        collectives.rank(),
        collectives.world_size(),
        together=collectives.uneven,
        gather=collectives.all_gather_object,
        **({"forget": handover.forget} if forget else {}),
    )


def filled(work: WorkFolder) -> np.ndarray:
    def rows(unit: slice) -> tuple[np.ndarray]:
        return (np.repeat(np.arange(unit.start, unit.stop), WIDTH).reshape(-1, WIDTH),)

    (made,) = work.fill(
        "made", row_ranges(ROWS, UNIT), {"numbers": ((ROWS, WIDTH), np.int32)}, rows
    )
    return made


def look_before_the_others_write(path: str, held: bool) -> Any:
    """Every rank reads the whole array while it is zero, then all fill it; with ``held`` it stays mapped."""
    work = WorkFolder(Path(path), group_of_ranks(forget=True))
    work.file("numbers", (ROWS, WIDTH), np.int32).close()
    with open(work.path("numbers"), "rb") as file:
        early = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert not any(early[128:])
    if not held:
        early.close()
    collectives.barrier()
    try:
        made = filled(work)
    except UserError as error:
        return str(error)
    return bool((made == np.arange(ROWS)[:, None]).all())


def test_pages_that_a_rank_has_seen_before_are_asked_for_again(
    pair: tuple[Host, ...], folder: Path
) -> None:
    """Even where opening the file again shows nothing new."""
    for name in ("shared", "stale"):
        path = str(folder / name / f"again-{name}")
        found = host_runs.call(
            pair, folder / f"job-{name}", look_before_the_others_write, path, False
        )
        assert [one.value for one in found] == [True, True], found[1].output


def test_a_rank_that_still_sees_old_pages_is_noticed(pair: tuple[Host, ...], folder: Path) -> None:
    """A mapping from before the writes keeps old pages: only comparing the contents helps."""
    path = str(folder / "stale" / "mapped")
    found = host_runs.call(pair, folder / "job-mapped", look_before_the_others_write, path, True)
    for one in found:
        assert str(one.value).startswith(
            "rank 0 reads rows that differ from those written: made"
        ), one.output


def hand_over_late(path: str) -> Any:
    """A file that rank 1 has found missing and rank 0 then writes; then one that only rank 0 sees."""
    root, rank = Path(path), collectives.rank()
    assert members.on_several_hosts()
    assert members.speaks_for_host(rank)
    if rank == 1:
        assert not (root / "late.json").exists()
    collectives.barrier()
    if rank == 0:
        durable.write_text(root / "late.json", "{}")
    handover.hand_over(root, lambda: handover.described(root, {"late.json": True}))
    seen = (root / "late.json").read_text()
    handover.WAIT_S = 0.2
    told = []
    for wanted in (handover.Written(2), handover.Written(3), handover.Written(2, "other")):
        try:
            handover.hand_over(root, lambda wanted=wanted: {"late.json": wanted})
            told.append("seen")
        except UserError as error:
            told.append(str(error))
    return seen, told


def test_a_file_is_waited_for_until_every_host_sees_it(
    pair: tuple[Host, ...], folder: Path
) -> None:
    (folder / "server" / "late").mkdir()
    found = host_runs.call(
        pair, folder / "job-late", hand_over_late, str(folder / "shared" / "late")
    )
    for one in found:
        seen, told = one.value
        assert seen == "{}", one.output
        assert told[0] == "seen"
        assert "late.json has 2 bytes instead of 3" in told[1]
        assert told[2].startswith(
            "rank 1 on node-b: files that another host has written are not seen"
        )
        assert "late.json has other contents" in told[2]
