"""Files and rows that hosts without a shared folder exchange through a store: the same bytes, or an error."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.row_file import RowFile
from cnn2gnn_dist.graph.search import approximate
from cnn2gnn_dist.graph.search import valid_nodes as valid
from cnn2gnn_dist.graph.search.work_units import RankGroup, WorkFolder
from cnn2gnn_dist.run_storage.depot import StoreDepot
from cnn2gnn_dist.run_storage.store import Store
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.shared_files import exchange_by_store as exchange
from cnn2gnn_dist.runtime.shared_files.exchange_by_store import Content, NowhereFound
from cnn2gnn_dist.runtime.shared_files.pieces import Piece
from tests.support import own_folders, rank_group
from tests.support.stored import s3_bucket, sources
from tests.unit.graph.test_approximate import points

HOSTS = ("a", "a", "b", "c")
"""The hosts of four ranks."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with s3_bucket() as store:
        yield store


def left(bucket: Any, url: str) -> list[str]:
    """What hosts have left for each other in a store."""
    return bucket.find(f"{url.removeprefix('s3://')}/exchange")


class Counted(StoreDepot):
    """A depot that records which objects are written and which are read."""

    def __init__(self, url: str, kept: Mapping[Content, str] | None = None) -> None:
        super().__init__(url, "the run", lambda: dict(kept or {}))
        self.written: list[str] = []
        self.read: list[str] = []

    def leave(self, content: Content, source: bytes | Path) -> str:
        self.written.append(content.sha256)
        return super().leave(content, source)

    def fetch(self, name: str, size: int, write: exchange.Write) -> None:
        self.read.append(name)
        super().fetch(name, size, write)


class Harmful(Counted):
    """One that flips a bit of everything it writes."""

    def leave(self, content: Content, source: bytes | Path) -> str:
        data = bytearray(source if isinstance(source, bytes) else source.read_bytes())
        if data:
            data[-1] ^= 1
        return super().leave(content, bytes(data))


def host_folder(root: str) -> Path:
    """This rank's folder, once the ranks believe to be on hosts."""
    own_folders.believe(HOSTS)
    folder = Path(root) / HOSTS[collectives.rank()]
    folder.mkdir(exist_ok=True)
    collectives.barrier()
    return folder


def rows_of(seed: int) -> tuple[np.ndarray, list[tuple[int, list[slice]]]]:
    """An array, and random shares of its rows: (rank, ranges) that cover it together."""
    rng = np.random.default_rng(seed)
    rows, width = int(rng.integers(1, 400)), int(rng.integers(1, 9))
    array = rng.integers(0, 2**31, (rows, width)).astype(np.int32)
    cuts = sorted({0, rows, *rng.integers(0, rows + 1, int(rng.integers(0, 12))).tolist()})
    ranges = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    shares: dict[tuple[int, int], list[slice]] = {}
    for one in rng.permutation(len(ranges)).tolist():
        shares.setdefault((int(rng.integers(4)), int(rng.integers(2))), []).append(ranges[one])
    return array, [(rank, spans) for (rank, _), spans in shares.items()]


def share_rows(root: str, url: str, seeds: range) -> list[tuple[bool, int, int, int]]:
    """For each seed: whether this host has the whole array, and the objects it wrote, first and again."""
    folder, found = host_folder(root), []
    for seed in seeds:
        array, shares = rows_of(seed)
        path, depot = folder / f"{seed}.npy", Counted(url)
        if exchange.members.speaks_for_host(collectives.rank()):
            durable.reserve_array(path, array.shape, np.int32)
        collectives.barrier()
        with RowFile(path) as file:
            for rank, spans in shares:
                if rank == collectives.rank():
                    for span in spans:
                        file.write(span.start, array[span])
            file.sync()
            pieces = [Piece(path, rank, tuple(map(file.span, spans))) for rank, spans in shares]
        exchange.share_pieces(pieces, depot)
        first = len(depot.written), len(depot.read)
        exchange.share_pieces(pieces, depot)
        found.append((np.array_equal(np.load(path), array), *first, len(depot.written) - first[0]))
    return found


def test_rows_that_ranks_of_three_hosts_have_written_are_everywhere(bucket, tmp_path):
    """Random arrays and shares; asked again, nothing is transferred, and no object stays in the store."""
    seeds = range(12)
    url = "s3://runs/rows"
    everyone = rank_group.run(share_rows, 4, str(tmp_path), url, seeds)
    for number, seed in enumerate(seeds):
        shares = rows_of(seed)[1]
        right, written, read, again = zip(*(rank[number] for rank in everyone), strict=True)
        assert all(right), seed
        # Host a writes what both of its ranks have made, and each host reads what it has not made.
        of_host = {h: sum(HOSTS[rank] == h for rank, _ in shares) for h in "abc"}
        assert written == (of_host["a"], 0, of_host["b"], of_host["c"])
        assert [read[0], *read[2:]] == [len(shares) - of_host[h] for h in "abc"]
        assert read[1] == 0
        assert again == (0, 0, 0, 0)
    assert left(bucket, url) == []


def searched(work: WorkFolder) -> tuple[bytes, bytes]:
    """Table and order of points of which some are not valid, in small units."""
    for module, names in (
        (approximate, ("SCAN_ROWS", "JOIN_ROWS", "PROBE_ROWS")),
        (valid, ("ROWS",)),
    ):
        for name in names:
            setattr(module, name, 500)
    z_Nd = points()
    z_Nd[::97] = 0
    some = valid.ValidNodes(work, valid.valid_nodes_of(z_Nd), len(z_Nd))
    z_Ad = some.rows("z", z_Nd)
    search = approximate.TableSearch(work, z_Ad, z_Ad, 12)
    found = some.whole(search.build(approximate.RecallGoal(0.97)))
    return np.asarray(found.table_NM).tobytes(), found.order_N.tobytes()


def search_apart(root: str, url: str) -> list[tuple[tuple[bytes, bytes], int]]:
    """The search twice, and how many objects this rank wrote; before the second, host b loses its folder."""
    folder, rank, found = host_folder(root) / "work", collectives.rank(), []
    for _ in (1, 2):
        depot = Counted(url)
        group = RankGroup(
            rank,
            len(HOSTS),
            together=collectives.uneven,
            gather=collectives.all_gather_object,
            creates=exchange.members.speaks_for_host(rank),
            share=lambda pieces, depot=depot: exchange.share_pieces(pieces, depot),
        )
        found.append((searched(WorkFolder(folder, group)), len(depot.written)))
        if rank == HOSTS.index("b"):
            shutil.rmtree(folder)
        collectives.barrier()
    return found


def test_a_search_by_ranks_of_three_hosts_gives_the_table_of_one_process(bucket, tmp_path):
    """Also after one host has lost its folder: it computes its own units again, and fetches the others'."""
    url = "s3://runs/searched"
    alone = searched(WorkFolder(tmp_path / "alone", RankGroup()))
    everyone = rank_group.run(search_apart, 4, str(tmp_path), url)
    assert all(table == alone for rank in everyone for table, _ in rank)
    first, again = zip(*([written for _, written in rank] for rank in everyone), strict=True)
    assert first[1] == again[1] == 0  # the other rank of host a does it
    assert min(first[0], first[2], first[3]) > 5
    assert again[2] == 0  # the others have what host b made, and made again
    assert again[0] > 5
    assert left(bucket, url) == []


def hand_over(root: str, url: str, kept: dict, harm: bool = False) -> Any:
    """Host a has ``one`` and ``two``, b a wrong ``one`` and ``three``, c nothing; all three are wanted."""
    folder, rank = host_folder(root), collectives.rank()
    contents = {"one": b"1" * 100, "two": b"", "sub/three": b"3" * 70_000}
    have = {0: {"one", "two"}, 2: {"sub/three"}}.get(rank, set())
    for name in have:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(contents[name])
    if rank == 2:
        (folder / "one").write_bytes(b"0" * 100)
    collectives.barrier()
    wanted = {name: exchange.content_of(data) for name, data in contents.items()}
    if "absent" in kept:
        wanted["nobody's"] = Content(3, "0" * 64)
    depot = (Harmful if harm else Counted)(url, kept.get("objects"))
    try:
        exchange.distribute(wanted, exchange.Files(folder), depot, str(folder))
    except NowhereFound as error:
        return "nowhere", error.what
    except UserError as error:
        there = {n: (folder / n).read_bytes() for n in contents if (folder / n).is_file()}
        assert not list(folder.rglob("*.tmp"))
        return "refused", error.what, there
    right = all((folder / name).read_bytes() == data for name, data in contents.items())
    return right, depot.written, depot.read


def test_each_host_fetches_what_it_lacks_from_one_that_has_it(bucket, tmp_path):
    url = "s3://runs/files"
    found = rank_group.run(hand_over, 4, str(tmp_path), url, {})
    sums = {
        n: exchange.content_of(d).sha256 for n, d in ((1, b"1" * 100), (2, b""), (3, b"3" * 70_000))
    }
    assert [one[0] for one in found] == [True] * 4
    assert [sorted(one[1]) for one in found] == [sorted([sums[1], sums[2]]), [], [sums[3]], []]
    assert [len(one[2]) for one in found] == [1, 0, 2, 3]
    assert left(bucket, url) == []


@pytest.mark.parametrize("harm", ["none", "flipped", "truncated", "removed"])
def test_what_the_store_keeps_is_fetched_from_there_or_from_a_host(bucket, tmp_path, harm):
    """A damaged object of the storage is passed over while a host still has the file."""
    url, data = f"s3://runs/kept-{harm}", b"3" * 70_000
    store = Store.open(url)
    store.claim()
    store.put("teacher", sources({"three": data}), "one")
    objects = {Content(*key): there for key, there in store.objects().items()}
    [(content, there)] = objects.items()
    assert content == exchange.content_of(data)
    name = there.removeprefix("s3://")
    if harm == "removed":
        bucket.rm_file(name)
    elif harm != "none":
        bucket.pipe_file(name, data[:-9] if harm == "truncated" else data[:-1] + b"?")
    found = rank_group.run(hand_over, 4, str(tmp_path), url, {"objects": objects})
    assert [one[0] for one in found] == [True] * 4
    assert (content.sha256 in found[2][1]) == (harm != "none")
    assert there in found[0][2]
    assert there in found[3][2]
    assert left(bucket, url) == []


def test_objects_that_arrive_damaged_replace_nothing(bucket, tmp_path):
    found = rank_group.run(hand_over, 4, str(tmp_path), "s3://runs/harmful", {}, True)
    assert {one[0] for one in found} == {"refused"}
    for one in found:
        assert "does not have the contents that were written" in one[1]
    assert found[2][2]["one"] == b"0" * 100  # as it was
    assert "sub/three" not in found[0][2]


def test_what_no_host_has_is_named_on_every_rank(bucket, tmp_path):
    found = rank_group.run(hand_over, 4, str(tmp_path), "s3://runs/nowhere", {"absent": True})
    what = "no host has nobody's as it was written, and the run's storage does not have it"
    assert found == [("nowhere", what)] * 4


def die_before_the_announcement(root: str, url: str) -> Any:
    """The host that has the file is killed when its object is written; the others learn nothing of it."""

    class Deadly(Counted):
        def leave(self, content: Content, source: bytes | Path) -> str:
            super().leave(content, source)
            os.kill(os.getpid(), signal.SIGKILL)
            return ""

    folder, rank = host_folder(root), collectives.rank()
    if rank == 2:
        (folder / "one").write_bytes(b"1" * 100)
    collectives.barrier()
    wanted = {"one": exchange.content_of(b"1" * 100)}
    with contextlib.suppress(RuntimeError):
        exchange.distribute(wanted, exchange.Files(folder), Deadly(url), str(folder))
        return "went on"
    return (folder / "one").exists()


def test_killed_between_object_and_announcement(bucket, tmp_path):
    """Nobody has half a file; the next start removes the object."""
    url = "s3://runs/killed"
    found = rank_group.launch(die_before_the_announcement, 4, str(tmp_path), url, group_timeout_s=8)
    assert found[2].returncode == -9
    assert [one.value for rank, one in enumerate(found) if rank != 2] == [False] * 3
    assert len(left(bucket, url)) == 1
    store = Store.open(url)  # not taken for something other than a run
    store.claim()
    assert left(bucket, url) == []


def test_a_host_with_another_store_is_refused(bucket):
    url = "s3://runs/checked"
    store = Store.open(url)
    store.claim()
    StoreDepot(url, store.owner).check(1)
    assert left(bucket, url) == []
    with pytest.raises(UserError, match="does not see the storage that rank 0 has opened"):
        StoreDepot(url, "another").check(1)
    with pytest.raises(UserError, match="does not exist"):
        StoreDepot("s3://none-such/run", store.owner).check(1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(urls, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(urls, "LONGEST_PAUSE", 0.02)
