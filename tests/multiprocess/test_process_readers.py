"""Reader processes without Ray: the same bytes even when they die, bounded memory, nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import select
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cnn2gnn_dist.data.images.crops import multi_crop
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.reading import pool as pools
from cnn2gnn_dist.data.reading import process_readers
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.process_readers import ProcessReaders
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.data.reading.shared_batches import MOST_LENT
from cnn2gnn_dist.errors import UserError
from tests.multiprocess.test_pool import COUNT, assert_same, expected, some_requests
from tests.support import REPOSITORY
from tests.support.odd_readers import (
    MOMENTS,
    Mortal,
    Noting,
    Poisoned,
    Stillborn,
    Unreadable,
    Waiting,
)
from tests.support.read_ahead import assert_read_ahead_is_the_prefetch
from tests.support.shards import make_shards, random_images

ROWS = 10


@pytest.fixture
def spec(tmp_path: Path) -> ReaderSpec:
    shards = make_shards(tmp_path / "s", random_images(COUNT), np.arange(COUNT) % 7, shard_size=16)
    index(shards, progress=False).save(tmp_path / "m.arrow")
    for name in ("read", "plan", "killed"):
        (tmp_path / name).mkdir()
    return ReaderSpec(str(tmp_path / "m.arrow"), ViewSpec("crop_flip", 32, seed=5))


def a_pool(spec: ReaderSpec, workers: int = 2, prefetch: int = 4) -> ReaderPool:
    return ReaderPool(spec, backend="processes", workers=workers, prefetch=prefetch)


def processes(pool: ReaderPool) -> list[process_readers._Process]:
    assert isinstance(pool._readers, ProcessReaders)
    return pool._readers.readers


def numbered(count: int) -> list[Request]:
    """Requests whose view is their number, so that the readers below can record it."""
    return [Request(np.arange(n, n + ROWS) % COUNT, n) for n in range(count)]


def settle(pool: ReaderPool) -> None:
    """Take the readers' messages until everything that was requested has been answered."""
    for reader in processes(pool):
        while reader.asked:
            assert select.select([reader.channel], [], [], 60)[0]
            reader.receive()


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 4), (3, 20)])
def test_they_give_what_a_reader_gives(spec, workers, prefetch):
    requests = some_requests()
    with a_pool(spec, workers, prefetch) as pool:
        found = list(pool.batches(requests))
        assert_same(found, expected(spec, requests))
        assert_same(list(pool.batches(requests[:2])), expected(spec, requests[:2]))
        assert list(pool.batches([])) == []
        assert pool.wait_seconds > 0
    # A batch has its own memory, which can be written even after the readers are gone.
    for batch in found:
        batch.images[:] = 7
        batch.valid &= False


def test_several_views_and_corrupt_samples_in_reused_memory(spec, tmp_path):
    shards = make_shards(tmp_path / "c", random_images(COUNT), np.arange(COUNT) % 7, suffix="jpg")
    manifest = index(shards, progress=False)
    manifest.save(tmp_path / "c.arrow")
    with open(shards[0], "r+b") as file:
        for sample in (3, 4, 17):
            file.seek(int(manifest.offset_N[sample]))
            file.write(bytes(20))
    groups = multi_crop(size=32, local_size=16, local_count=3, seed=5)
    for views in (groups, ViewSpec("crop_flip", 32, cutout=9, fill=(9, 9, 9))):
        for decoded in (0, 1 << 20):
            several = ReaderSpec(str(tmp_path / "c.arrow"), views, decoded)
            requests, reader = some_requests(), Reader(several)
            with a_pool(several, 1, 1) as pool:
                for batch, request in zip(pool.batches(requests), requests, strict=True):
                    wanted = reader.read(request)
                    assert_same([batch], [wanted])
                    for left, right in zip(batch.crops, wanted.crops, strict=True):
                        np.testing.assert_array_equal(left, right)
                    batch.images[:] = 201  # the next batch may use this memory
                    del batch


def test_memory_is_reused_once_a_batch_is_gone_and_never_before(spec):
    requests, wanted = numbered(40), expected(spec, numbered(40))
    with a_pool(spec, 1, 3) as pool:
        for batch, one in zip(pool.batches(requests), wanted, strict=True):
            assert_same([batch], [one])
            del batch
        assert processes(pool)[0]._buffers <= 3 + 2
        kept = [batch.images[2:4, ::2] for batch in pool.batches(requests)]  # views of views
        for view, one in zip(kept, wanted, strict=True):
            np.testing.assert_array_equal(view, one.images[2:4, ::2])
        assert processes(pool)[0]._buffers >= MOST_LENT
        del kept, view
        gc.collect()
        before = processes(pool)[0]._buffers
        larger = [Request(np.arange(COUNT), n) for n in range(6)]
        for batch, one in zip(pool.batches(larger), expected(spec, larger), strict=True):
            assert_same([batch], [one])
            del batch
        assert processes(pool)[0]._buffers <= before + 3 + 2
        assert len(processes(pool)[0].spares) <= 3 + 2  # the smaller ones have been released


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
def test_who_keeps_all_batches_does_not_use_up_the_open_files(spec):
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    requests = numbered(4 * MOST_LENT)
    with a_pool(spec, 2, 4) as pool:
        before = open_files()
        kept = list(pool.batches(requests))
        assert open_files() <= before + 2 * (MOST_LENT + 4 + 2)
        for batch in kept[::2]:
            batch.images[:] = 201  # nobody else's memory
        assert_same(kept[1::2], expected(spec, requests[1::2]))
        del batch, kept
        gc.collect()
        assert_same(list(pool.batches(requests[:5])), expected(spec, requests[:5]))


def test_memory_that_the_system_refuses_is_not_taken_for_a_dead_reader(spec):
    with a_pool(spec, 1, 1) as pool:
        assert_same(list(pool.batches(numbered(1))), expected(spec, numbered(1)))
        reader, limits = processes(pool)[0].process.pid, resource.getrlimit(resource.RLIMIT_NOFILE)
        assert processes(pool)[0].spares.pop() is not None
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(UserError, match="no shared memory for a batch"):
                next(pool.batches(numbered(1)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert processes(pool)[0].process.pid == reader


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 3), (3, 7)])
def test_what_is_read_ahead_is_the_prefetch(spec, monkeypatch, workers, prefetch):
    monkeypatch.setattr(process_readers, "READER", Noting)
    with a_pool(spec, workers, prefetch) as pool:
        folder = Path(spec.manifest).parent / "read"
        assert_read_ahead_is_the_prefetch(pool, numbered(20), prefetch, folder, settle)


def test_what_an_abandoned_loop_had_asked_is_not_read(spec, monkeypatch):
    monkeypatch.setattr(process_readers, "READER", Waiting)
    folder = Path(spec.manifest).parent
    for name in ("begun", "go"):
        os.mkfifo(folder / name)
    with a_pool(spec, 1, 6) as pool:
        loop = pool.batches(numbered(20))
        first = next(loop)  # request 1 waits for the test, 2 to 6 for it
        (folder / "begun").read_text()
        loop.close()
        (folder / "go").write_text("go")
        again = [Request(np.arange(4), 100)]
        assert_same(list(pool.batches(again)), expected(spec, again))
        assert_same([first], expected(spec, numbered(1)))
        assert not processes(pool)[0].asked
    assert sorted(int(path.name) for path in (folder / "read").iterdir()) == [0, 1, 100]


def test_every_batch_exactly_once_under_thirty_kills(spec, monkeypatch):
    monkeypatch.setattr(process_readers, "READER", Mortal)
    folder, rng, count, workers = Path(spec.manifest).parent, random.Random(2), 60, 3
    for n in rng.sample(range(count), 12):
        (folder / "plan" / f"{rng.choice(MOMENTS[1:])}-{n}").touch()
    for n in rng.sample(range(workers + 1, workers + 16), 3):
        (folder / "plan" / f"start-{n}").touch()
    after, kills, found = set(rng.sample(range(count - 10), 8)), 0, []
    with a_pool(spec, workers, 5) as pool:
        for number, batch in enumerate(pool.batches(numbered(count))):
            found.append(batch)
            if number in after:
                victims = rng.sample(processes(pool), 2)
                for victim in victims:
                    victim.process.kill()  # reading, idle or starting
                kills += len(victims)
    kinds = Counter(path.name.split("-")[0] for path in (folder / "killed").iterdir())
    assert kills + sum(kinds.values()) >= 25, (kills, kinds)
    assert set(kinds) == set(MOMENTS), kinds
    assert_same(found, expected(spec, numbered(count)))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_request_that_kills_every_reader_is_named_and_not_its_neighbors(
    spec, monkeypatch, workers
):
    monkeypatch.setattr(process_readers, "READER", Poisoned)
    monkeypatch.setattr(process_readers, "MOST_DEATHS", 3)
    with a_pool(spec, workers, 4) as pool:
        loop = pool.batches(numbered(12))
        found = [next(loop) for _ in range(7)]
        with pytest.raises(UserError, match="died 3 times") as caught:
            list(loop)
        assert "[7, 8, 9, 10]" in caught.value.where
        assert "view 7" in caught.value.where
        assert_same(found, expected(spec, numbered(7)))
        assert_same(list(pool.batches(numbered(3))), expected(spec, numbered(3)))


def test_readers_that_cannot_start_end_the_stream(spec, monkeypatch):
    monkeypatch.setattr(process_readers, "READER", Stillborn)
    monkeypatch.setattr(process_readers, "MOST_DEATHS", 3)
    with a_pool(spec) as pool, pytest.raises(UserError, match="exit code 7"):
        list(pool.batches(numbered(4)))


def test_an_error_of_a_reader_is_raised_here_with_its_traceback(spec):
    with a_pool(spec, 1) as pool:
        loop = pool.batches([*numbered(2), Request(np.array([COUNT]), 0), *numbered(2)])
        assert_same([next(loop), next(loop)], expected(spec, numbered(2)))
        with pytest.raises(IndexError, match=f"sample ids {COUNT}") as caught:
            next(loop)
        assert "reader_process.py" in "".join(caught.value.__notes__)
        assert_same(list(pool.batches(numbered(3))), expected(spec, numbered(3)))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_wrong_shard_is_the_users_error(spec, damage):
    bad = Path(spec.manifest).parent / "s" / "shard-000002.tar"
    if damage == "missing":
        bad.unlink()
    else:
        os.truncate(bad, bad.stat().st_size - 700)
    with a_pool(spec, 1, 2) as pool:
        requests = [Request(np.arange(4), 0), Request(np.arange(30, 36), CLEAN)]
        loop = pool.batches(requests)
        next(loop)
        with pytest.raises(UserError) as caught:
            next(loop)
        assert caught.value.where == str(bad)
        assert_same(list(pool.batches(requests[:1])), expected(spec, requests[:1]))


def test_a_missing_manifest_is_reported_at_once(spec):
    with pytest.raises(UserError):
        a_pool(replace(spec, manifest="/nowhere/m.arrow"))


def test_processes_end_with_the_pool(spec):
    pool = a_pool(spec)
    loop = pool.batches(numbered(9))
    batch = next(loop)
    mine = [psutil.Process(reader.process.pid) for reader in processes(pool)]
    pool.close()
    assert not [process for process in mine if process.is_running()]
    pool.close()  # closing twice is allowed
    assert_same([batch], expected(spec, numbered(1)))


def test_a_reader_ends_with_its_parent_though_another_child_holds_its_socket(spec, tmp_path):
    """As the workers of a DataLoader do, since they are forks."""
    code = f"""
import os, signal, sys, time
from tests.multiprocess.test_process_readers import *
pool = a_pool(ReaderSpec({spec.manifest!r}, ViewSpec("crop_flip", 32)), 1)
next(pool.batches(numbered(3)))
fork = os.fork()
if fork == 0:
    signal.pause()
print(processes(pool)[0].process.pid, fork, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        reader, fork = (int(word) for word in driver.stdout.readline().split())
        assert driver.wait(60) == -signal.SIGKILL
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(reader)
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(30)
            assert process.status() == psutil.STATUS_ZOMBIE  # where nobody reaps orphans
    finally:
        os.kill(fork, signal.SIGKILL)


def drawing(image: Image.Image) -> Image.Image:
    """A hook that draws random numbers and returns the number of its process as a color."""
    torch.rand(())
    color = os.getpid() % 256, os.getpid() // 256 % 256, os.getpid() // 65536
    return Image.new("RGB", image.size, color)


@pytest.mark.parametrize("backend", ["local", "auto", "processes"])
def test_a_hook_never_runs_in_the_process_that_trains(spec, backend, monkeypatch):
    """It would seed the generators from which the training draws at the same time."""
    monkeypatch.setattr(pools, "_ray_runs", lambda: False)  # another test's Ray may be up
    views = replace(spec.views, hook=f"{__name__}:drawing")
    with ReaderPool(replace(spec, views=views), backend=backend, workers=1, prefetch=2) as pool:
        for batch in pool.batches(numbered(2)):
            first = batch.images[0, 0, 0].astype(int)
            assert first @ [1, 256, 65536] == processes(pool)[0].process.pid
            assert (batch.images == batch.images[0, 0, 0]).all()


def test_an_error_of_the_disk_is_named_and_not_taken_for_a_death(spec, monkeypatch):
    monkeypatch.setattr(process_readers, "READER", Unreadable)
    with (
        a_pool(spec, 1, 1) as pool,
        pytest.raises(OSError, match=r"Input/output error.*shard-000000"),
    ):
        list(pool.batches(numbered(1)))
