"""Rows of arrays on disk: written in place, marked once they are synced, read as written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph import row_file
from cnn2gnn_dist.graph.row_file import RowFile, check_sum, read_rows
from cnn2gnn_dist.graph.search import work_units
from cnn2gnn_dist.graph.search.work_units import RankGroup, WorkFolder, row_ranges
from cnn2gnn_dist.graph.version import GraphWriter
from cnn2gnn_dist.stages.neighbours import embeddings
from cnn2gnn_dist.stages.neighbours.embeddings import Embedded

KINDS = (np.float16, np.float32, np.int32)


@given(
    st.integers(1, 40),
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39), st.integers(-9, 9)), max_size=8),
)
@settings(deadline=None, max_examples=60)
def test_written_rows_are_numpys(
    rows: int, shape: tuple[int, ...], kind: type, writes: list[tuple[int, int, int]]
) -> None:
    want = np.zeros((rows, *shape), kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npy"
        durable.reserve_array(path, want.shape, kind)
        size = path.stat().st_size
        with RowFile(path) as file:
            total = 0
            for start, count, value in writes:
                stop = min(start + count, rows)
                if start > rows:
                    with pytest.raises(IndexError):
                        file.write(start, np.zeros((1, *shape)))
                    continue
                values = (value + np.arange(want[start:stop].size)).reshape(want[start:stop].shape)
                want[start:stop] = values
                total = file.write(start, values, total)
                np.testing.assert_array_equal(read_rows(path), want)
                assert check_sum(want[start:stop]) == check_sum(read_rows(path)[start:stop])
            file.sync()
        assert path.stat().st_size == size
        np.testing.assert_array_equal(np.load(path), want)


def test_sums_go_on_and_notice_every_byte(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    durable.reserve_array(tmp_path / "a.npy", rows.shape, np.float32)
    with RowFile(tmp_path / "a.npy") as file:
        first = file.write(0, rows[:7])
        assert file.write(7, rows[7:], first) == check_sum(rows)
    for byte in range(rows.nbytes):
        other = rows.copy()
        other.view(np.uint8).reshape(-1)[byte] ^= 1
        assert check_sum(other) != check_sum(rows)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write may accept less than it was given (2 GiB at most, or a signal)."""
    rows = np.arange(300, dtype=np.int32).reshape(100, 3)
    durable.reserve_array(tmp_path / "a.npy", rows.shape, np.int32)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: write(handle, data[:7], at))
    with RowFile(tmp_path / "a.npy") as file:
        file.write(0, rows)
        with pytest.raises(ValueError):
            file.write(0, rows[:, :2])
    np.testing.assert_array_equal(read_rows(tmp_path / "a.npy"), rows)


def numbers(unit: slice) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(unit.start, unit.stop)
    return rows * 10, np.stack([rows, rows + 0.5], 1)


ARRAYS = {"tens": ((23,), np.int32), "halves": ((23, 2), np.float32)}


def filled(folder: Path, group: RankGroup, work: Callable[[slice], Any] = numbers) -> Any:
    return WorkFolder(folder, group).fill("made", row_ranges(23, 5), ARRAYS, work)


def right(arrays: Any) -> bool:
    want = numbers(slice(0, 23))
    return all(np.array_equal(a, w) for a, w in zip(arrays, want, strict=True))


def test_a_mark_comes_after_its_rows_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            done.append(name)
            return real(*given, **named)

        return call

    monkeypatch.setattr(os, "pwrite", noted("rows", os.pwrite))
    monkeypatch.setattr(RowFile, "sync", noted("sync", RowFile.sync))
    monkeypatch.setattr(work_units.durable, "write_text", noted("mark", durable.write_text))
    assert right(filled(tmp_path, RankGroup()))
    assert done == ["rows", "rows", "sync", "sync", "mark"] * 5


def test_rows_that_were_marked_and_lost_are_made_again(tmp_path: Path) -> None:
    """As after a power loss that kept the mark but not the rows, or when a file server lost a page."""
    filled(tmp_path, RankGroup())
    with RowFile(tmp_path / "halves.npy") as file:
        file.write(12, np.zeros((1, 2)))
    with pytest.raises(
        UserError, match=r"rank 0 reads rows that differ from those written: made 10\.\.15"
    ):
        filled(tmp_path, RankGroup())
    assert right(filled(tmp_path, RankGroup()))


class Ranks:
    """Ranks as threads; the rank ``stale`` reads zeros, as from a stale page cache."""

    def __init__(self, count: int, stale: int | None = None) -> None:
        self.count, self.stale = count, stale
        self.meeting, self.said = threading.Barrier(count, timeout=600), [None] * count

    def group(self, rank: int) -> RankGroup:
        def gather(own: Any) -> list[Any]:
            self.said[rank] = own
            self.meeting.wait()
            everyone = list(self.said)
            self.meeting.wait()
            return everyone

        class Together:
            def __enter__(self) -> None:
                pass

            def __exit__(inner, *_: object) -> None:
                self.meeting.wait()

        return RankGroup(rank, self.count, 1, Together, gather)

    def run(self, work: Callable[[RankGroup], Any]) -> list[Any]:
        """What each rank's work returned, or the user error it ended with; another exception ends all ranks."""
        found: list[Any] = [None] * self.count
        failed: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                found[rank] = work(self.group(rank))
            except UserError as error:
                found[rank] = error
            except BaseException as error:
                failed.append(error)
                self.meeting.abort()  # or the others would wait for this rank

        threads = [
            threading.Thread(target=one, args=(r,), name=f"rank {r}") for r in range(self.count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return found

    def read(self, path: Path) -> np.ndarray:
        rows = read_rows(path)
        return rows * 0 if threading.current_thread().name == f"rank {self.stale}" else rows


@pytest.mark.parametrize("stale", [None, 0, 2])
def test_a_rank_that_reads_stale_rows_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: int | None
) -> None:
    ranks = Ranks(3, stale)
    monkeypatch.setattr(work_units, "read_rows", ranks.read)
    found = ranks.run(lambda group: filled(tmp_path, group))
    if stale is None:
        assert all(right(arrays) for arrays in found)
        return
    for error in found:
        assert f"rank {stale} reads rows that differ from those written: made" in str(error)
    monkeypatch.setattr(work_units, "read_rows", read_rows)
    assert all(right(arrays) for arrays in Ranks(3).run(lambda group: filled(tmp_path, group)))


X = np.random.default_rng(1).standard_normal((203, 5)).astype(np.float16)


def embed(folder: Path, group: RankGroup, stop: int | None = None) -> list[np.ndarray] | int:
    """Write X as x, and its first columns as z and query; stop after ``stop`` batches."""
    writer = GraphWriter(folder)
    made = Embedded(writer, WorkFolder(folder / "work", group), len(X), 3, 2)
    plan = made._plan(group.rank)
    first = made.batches_done
    for step in range(first, len(plan) if stop is None else stop):
        ids, mask = plan[step]
        rows = X[ids][mask]
        if mask.any():
            made.write("x", int(ids[0]), rows)
            made.write("z", int(ids[0]), rows[:, :2])
            made.write("query", int(ids[0]), -rows[:, :2])
        if (step + 1) % embeddings.NOTE == 0 or step + 1 == len(plan):
            made.note()
    if stop is not None:
        return first
    made.close()
    return [np.array(made.array(name)) for name in ("x", "z", "query")]


def folder_for(path: Path) -> Path:
    path.mkdir()
    for name, width in (("x", 5), ("z", 2)):
        kind = np.float16 if name == "x" else np.float32
        durable.reserve_array(path / f"{name}.npy", (len(X), width), kind)
    return path


@pytest.mark.parametrize("count", [1, 2, 3])
def test_embedded_rows_after_an_interruption(tmp_path: Path, count: int) -> None:
    folder = folder_for(tmp_path / "v")
    firsts = Ranks(count).run(lambda group: embed(folder, group, 17 + group.rank))
    assert firsts == [0] * count
    assert Ranks(count).run(lambda group: embed(folder, group, 16)) == [embeddings.NOTE] * count
    for arrays in Ranks(count).run(lambda group: embed(folder, group)):
        for array, want in zip(arrays, (X, X[:, :2], -X[:, :2]), strict=True):
            np.testing.assert_array_equal(array, want)


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_search_does_not_outlive_rows_that_are_embedded_again(
    tmp_path: Path, lost: int | None
) -> None:
    """Each rank has a folder of its own, as on hosts that share none; one is lost after a search was begun."""
    folders = [folder_for(tmp_path / f"v{rank}") for rank in range(2)]

    def attempt(group: RankGroup) -> list[np.ndarray] | int:
        return embed(folders[group.rank], replace(group, creates=True), 34)  # of 68 batches

    Ranks(2).run(attempt)
    begun = [folder / "work" / name for folder in folders for name in ("made-00000.done", "a.npy")]
    for path in begun:
        path.write_text("[1]")
    if lost is not None:
        shutil.rmtree(folders[lost])
        folder_for(folders[lost])
    firsts = Ranks(2).run(attempt)
    assert [path.exists() for path in begun] == [lost is None] * 4
    assert firsts == [34 if lost is None else 0] * 2
    assert all((folder / "work" / "query.npy").exists() for folder in folders)


@pytest.mark.parametrize(("rank", "name"), [(0, "x"), (0, "z"), (1, "z"), (1, "query")])
def test_embedded_rows_that_others_read_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, name: str
) -> None:
    folder, real = folder_for(tmp_path / "v"), Embedded.array

    def stale(self: Embedded, asked: str) -> np.ndarray:
        rows = real(self, asked)
        return rows * 0 if (asked, self.work_folder.group.rank) == (name, rank) else rows

    monkeypatch.setattr(Embedded, "array", stale)
    for error in Ranks(2).run(lambda group: embed(folder, group)):
        assert (
            f"rank {rank} reads rows that differ from those written: embedded rows of rank"
            in str(error)
        )


def test_marks_of_another_form_do_not_count(tmp_path: Path) -> None:
    for unit, text in enumerate(["", "{", "3", json.dumps(["a"])]):
        (tmp_path / f"made-{unit:05d}.done").write_text(text)
    assert right(filled(tmp_path, RankGroup()))
    assert row_file.check_sum(np.zeros((0, 3))) == 0
