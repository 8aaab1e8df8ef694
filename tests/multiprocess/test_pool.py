"""The stream: both backends give the same bytes in order, even when readers die."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from cnn2gnn_dist.data.images.crops import multi_crop
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.reading import pool as pools
from cnn2gnn_dist.data.reading import ray_readers
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.data.reading.shared_batches import MOST_LENT, Lender
from cnn2gnn_dist.errors import UserError
from tests.support.odd_actors import DiesOnce, Suicidal
from tests.support.shards import make_shards, random_images

pytestmark = pytest.mark.ray

COUNT = 60


@pytest.fixture
def spec(tmp_path: Path) -> ReaderSpec:
    shards = make_shards(tmp_path / "s", random_images(COUNT), np.arange(COUNT) % 7, shard_size=16)
    index(shards, progress=False).save(tmp_path / "m.arrow")
    return ReaderSpec(str(tmp_path / "m.arrow"), ViewSpec("crop_flip", 32, seed=5))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reader actors find lent memory as those of another host do: its number belongs to something else."""
    loan = Lender.loan
    monkeypatch.setattr(
        Lender, "loan", lambda self, buffer: replace(loan(self, buffer), name="another")
    )


def some_requests(count: int = 12) -> list[Request]:
    rng = np.random.default_rng(1)
    return [Request(rng.permutation(COUNT)[: 5 + i % 4], i % 3 - 1) for i in range(count)]


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for name in ("images", "labels", "ids", "valid"):
            left, right = getattr(one, name), getattr(other, name)
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        assert one.problems == other.problems


def expected(spec: ReaderSpec, requests: list[Request]) -> list[Batch]:
    reader = Reader(spec)
    return [reader.read(request) for request in requests]


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 4), (2, 3), (3, 20)])
def test_local_gives_what_a_reader_gives(spec, workers, prefetch):
    requests = some_requests()
    with ReaderPool(spec, backend="local", workers=workers, prefetch=prefetch) as stream:
        assert_same(list(stream.batches(requests)), expected(spec, requests))
        # Again on the same stream: one epoch after the other.
        assert_same(list(stream.batches(iter(requests[:2]))), expected(spec, requests[:2]))
        assert list(stream.batches([])) == []
        assert stream.wait_seconds > 0


@pytest.mark.parametrize(
    ("workers", "prefetch", "host"), [(1, 1, "this"), (2, 4, "this"), (2, 4, "another")]
)
def test_ray_gives_what_a_reader_gives(spec, ray_cluster, workers, prefetch, host, request):
    if host == "another":
        request.getfixturevalue("elsewhere")
    requests = some_requests()
    with ReaderPool(spec, backend="ray", workers=workers, prefetch=prefetch) as stream:
        found = list(stream.batches(requests))
        assert_same(found, expected(spec, requests))
        assert_same(list(stream.batches(requests[:2])), expected(spec, requests[:2]))
        assert stream.wait_seconds > 0
        # Memory of this process, which can be written; not a view of the object store.
        assert all(b.images.flags.writeable for b in found)
        assert all(b.images.flags.owndata == (host == "another") for b in found)


def test_batches_that_are_kept_do_not_use_up_what_can_be_lent(spec, ray_cluster):
    requests = some_requests(MOST_LENT + 8)
    with ReaderPool(spec, backend="ray", workers=1, prefetch=2) as stream:
        found = list(stream.batches(requests))
        assert_same(found, expected(spec, requests))
        assert [b.images.flags.owndata for b in found] == [False] * MOST_LENT + [True] * 8
        del found
        (again,) = stream.batches(requests[:1])
        assert_same([again], expected(spec, requests[:1]))
        assert not again.images.flags.owndata


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_several_views_are_the_same_from_any_backend(spec, backend, request):
    if backend == "ray":
        request.getfixturevalue("ray_cluster")
    several = replace(spec, views=multi_crop(size=32, local_size=16, local_count=3, seed=5))
    requests, reader = some_requests(), Reader(several)
    with ReaderPool(several, backend=backend, workers=2, prefetch=4) as stream:
        found = list(stream.batches(requests))
    assert_same(found, [reader.read(one) for one in requests])
    for batch, one in zip(found, requests, strict=True):
        wanted = reader.read(one).crops
        assert [crop.shape[0] for crop in batch.crops] == ([1, 1] if one.view == CLEAN else [2, 3])
        for left, right in zip(batch.crops, wanted, strict=True):
            np.testing.assert_array_equal(left, right)
            assert left.flags.writeable


def test_order_holds_when_readers_finish_out_of_order(spec, monkeypatch):
    later = [threading.Event() for _ in range(4)]
    plain = Reader.read

    def read(self, request):
        turn = int(request.ids[0])
        if turn < 3:  # each reader waits until the next one is done
            assert later[turn + 1].wait(60)
        batch = plain(self, request)
        later[turn].set()
        return batch

    requests = [Request(np.array([i, 9]), 0) for i in range(4)]
    wanted = expected(spec, requests)
    monkeypatch.setattr(Reader, "read", read)
    with ReaderPool(spec, backend="local", workers=4, prefetch=4) as stream:
        assert_same(list(stream.batches(requests)), wanted)


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_requests_are_taken_lazily(spec, prefetch):
    taken = 0

    def source():
        nonlocal taken
        for request in some_requests(20):
            taken += 1
            yield request

    with ReaderPool(spec, backend="local", workers=2, prefetch=prefetch) as stream:
        for received, _ in enumerate(stream.batches(source()), 1):
            assert taken <= received + prefetch
            if received < 10:
                assert taken == received + prefetch  # kept full while the caller computes
        assert taken == 20


def test_waiting_adds_up(spec, monkeypatch):
    clock = types.SimpleNamespace(perf_counter=itertools.count().__next__, sleep=None)
    monkeypatch.setattr(pools, "time", clock)  # each reading of this clock is a second later
    with ReaderPool(spec, backend="local", workers=2, prefetch=3) as stream:
        assert stream.wait_seconds == 0
        for number, _ in enumerate(stream.batches(some_requests(7)), 1):
            assert stream.wait_seconds == number


def test_what_an_abandoned_loop_had_asked_is_not_read(spec, monkeypatch):
    read, goes_on, plain = [], threading.Event(), Reader.read

    def slow(self, request):
        read.append(request)
        if len(read) == 2:
            assert goes_on.wait(60)
        return plain(self, request)

    monkeypatch.setattr(Reader, "read", slow)
    requests, other = some_requests(8), Request(np.array([3]), 0)
    with ReaderPool(spec, backend="local", workers=1, prefetch=7) as stream:
        loop = stream.batches(requests)
        next(loop)
        loop.close()  # the second may be in progress, the others wait
        goes_on.set()
        list(stream.batches([other]))
    assert read[-1] is other
    assert len(read) <= 3


def test_an_abandoned_loop_leaves_the_stream_usable(spec):
    requests = some_requests(8)
    with ReaderPool(spec, backend="local", workers=1, prefetch=8) as stream:
        loop = stream.batches(requests)
        next(loop)
        loop.close()
        assert_same(list(stream.batches(requests)), expected(spec, requests))


def test_killed_readers_are_replaced_and_asked_again(spec, ray_cluster, monkeypatch):
    import ray

    asked, victims = [], {}
    plain = ray_readers._Reader.ask

    def ask(self, answer):
        asked.append(answer)
        victim = victims.pop(self, None) if len(asked) > 6 else None
        if victim is not None:
            os.kill(victim, signal.SIGSTOP)  # so that it can't answer before it is killed
        plain(self, answer)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)

    monkeypatch.setattr(ray_readers._Reader, "ask", ask)
    requests = some_requests(16)
    with ReaderPool(spec, backend="ray", workers=2, prefetch=4) as stream:
        first = stream._readers._readers[0]
        victims[first] = ray.get(first.actor.process_id.remote())
        found = list(stream.batches(requests))
    assert not victims
    assert_same(found, expected(spec, requests))
    assert len(asked) > len(requests)


def test_readers_that_die_while_they_read(spec, ray_cluster, monkeypatch):
    monkeypatch.setattr(ray_readers, "ReaderActor", DiesOnce)
    requests = [Request(np.arange(i, i + 6), 2) for i in range(8)]
    with ReaderPool(spec, backend="ray", workers=1, prefetch=3) as stream:
        found = list(stream.batches(requests))
    assert_same(found, expected(spec, requests))
    assert (Path(spec.manifest).parent / "died").exists()


def test_a_request_that_kills_every_reader_is_named(spec, ray_cluster, monkeypatch):
    monkeypatch.setattr(ray_readers, "MOST_DEATHS", 2)
    monkeypatch.setattr(ray_readers, "ReaderActor", Suicidal)
    with (
        ReaderPool(spec, backend="ray", workers=1, prefetch=1) as stream,
        pytest.raises(UserError, match="died 2 times") as caught,
    ):
        list(stream.batches([Request(np.array([7, 8]), 3)]))
    assert "[7, 8]" in caught.value.where
    assert "view 3" in caught.value.where


def test_actors_end_with_the_stream_and_have_readable_names(spec, ray_cluster):
    import ray

    with ReaderPool(spec, backend="ray", workers=2, prefetch=1, name="train") as stream:
        names = sorted(ray.util.list_named_actors())
        assert [name.rsplit("-", 1)[0] for name in names if name.startswith("train")] == [
            "train-0",
            "train-1",
        ]
        ids = ray.get([r.actor.process_id.remote() for r in stream._readers._readers])
        processes = [psutil.Process(i) for i in ids]
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    stream.close()  # closing twice is allowed


@pytest.mark.parametrize(
    ("backend", "damage"),
    [
        ("local", "missing"),
        ("local", "truncated"),
        ("ray", "missing"),
    ],
)
def test_a_wrong_shard_is_the_users_error(spec, backend, damage, request):
    if backend == "ray":
        request.getfixturevalue("ray_cluster")
    bad = Path(spec.manifest).parent / "s" / "shard-000002.tar"
    if damage == "missing":
        bad.unlink()
    else:
        os.truncate(bad, bad.stat().st_size - 700)
    with ReaderPool(spec, backend=backend, workers=1, prefetch=2) as stream:
        requests = [Request(np.arange(4), 0), Request(np.arange(30, 36), 0)]
        loop = stream.batches(requests)
        next(loop)
        with pytest.raises(UserError) as caught:
            next(loop)
        assert caught.value.where == str(bad)
        assert caught.value.remedy
        # The stream still works for data in other shards.
        assert_same(list(stream.batches(requests[:1])), expected(spec, requests[:1]))


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_corrupt_samples_are_reported_not_raised(tmp_path, backend, request):
    if backend == "ray":
        request.getfixturevalue("ray_cluster")
    shards = make_shards(tmp_path, random_images(6), np.arange(6), suffix="jpg")
    manifest = index(shards, progress=False)
    manifest.save(tmp_path / "m.arrow")
    with open(shards[0], "r+b") as file:
        file.seek(int(manifest.offset_N[3]))
        file.write(bytes(20))
    spec = ReaderSpec(str(tmp_path / "m.arrow"), ViewSpec("none", 32))
    with ReaderPool(spec, backend=backend, workers=1, prefetch=2) as stream:
        (batch,) = stream.batches([Request(np.arange(6), CLEAN)])
    assert batch.valid.tolist() == [True, True, True, False, True, True]
    assert len(batch.problems) == 1
    assert batch.problems[0].startswith(f"{shards[0]}: {manifest.key(3)}: ")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_threads_end_with_the_pool_whatever_is_raised(spec, error):
    before = set(threading.enumerate())

    def train():
        with ReaderPool(spec, backend="local", workers=3, prefetch=5) as stream:
            for _ in stream.batches(some_requests(20)):
                assert any(thread.name.startswith("reader") for thread in threading.enumerate())
                raise error

    with pytest.raises(error):
        train()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"backend": "thread"}, "stream.backend"),
        ({"workers": 0}, "stream.workers"),
        ({"prefetch": 0}, "stream.prefetch"),
    ],
)
def test_wrong_arguments(spec, change, where):
    with pytest.raises(UserError) as caught:
        ReaderPool(spec, **{"backend": "local", "workers": 1, "prefetch": 1, **change})
    assert where in caught.value.where


def test_ray_must_run(spec, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match="Ray is not running"):
        ReaderPool(spec, backend="ray", workers=1, prefetch=1)


def test_the_sessions_cluster_listens_on_the_loopback_only(ray_cluster):
    children = psutil.Process().children(recursive=True)
    sockets = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # it has exited since
            sockets += child.net_connections("inet")
    listening = {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert listening


def test_a_missing_manifest_is_reported_at_once(tmp_path, ray_cluster):
    spec = ReaderSpec(str(tmp_path / "none.arrow"), ViewSpec("none", 32))
    with pytest.raises(UserError, match="no manifest"):
        ReaderPool(spec, backend="ray", workers=1, prefetch=1)


def test_a_thread_that_waits_forever_does_not_keep_the_stream_open(
    spec: ReaderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file server is gone; the process has to report why it ends."""
    back = threading.Event()
    monkeypatch.setattr(pools, "CLOSING_SECONDS", 0.1)
    monkeypatch.setattr(Reader, "read", lambda self, request: back.wait())
    pool = ReaderPool(spec, backend="local", workers=1, prefetch=1)
    pool._readers.ask(some_requests(1)[0])
    pool.close()
    back.set()
