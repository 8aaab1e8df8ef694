"""With a slow trainer the requests in flight are bounded and never overfill Ray's object store."""

from __future__ import annotations

import concurrent.futures
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.reading import ray_readers
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.errors import UserError
from tests.multiprocess.test_pool import elsewhere  # noqa: F401 (fixture)
from tests.support.odd_actors import GatedActor, NotingActor, note, wait_for
from tests.support.read_ahead import assert_read_ahead_is_the_prefetch
from tests.support.shards import make_shards, random_images

pytestmark = pytest.mark.ray

COUNT, SIZE, ROWS = 64, 128, 32
BATCH_BYTES = ROWS * (3 * SIZE * SIZE + 17)
SLACK = 64 << 10
"""Bytes that Ray adds to a batch, including the pickle of its small parts."""

backends = pytest.mark.parametrize("backend", ["local", "ray"], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend whose readers record what they read."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
        monkeypatch.setattr(ray_readers, "ReaderActor", NotingActor)
    else:
        plain = Reader.read

        def noting(self, wanted):
            note(self.manifest_path, wanted.view)
            return plain(self, wanted)

        monkeypatch.setattr(Reader, "read", noting)
    return request.param


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReaderSpec:
    shards = make_shards(tmp_path / "s", random_images(COUNT), np.arange(COUNT) % 7, shard_size=16)
    index(shards, progress=False).save(tmp_path / "m.arrow")
    (tmp_path / "read").mkdir()
    monkeypatch.setattr(Reader, "manifest_path", str(tmp_path / "m.arrow"), raising=False)
    return ReaderSpec(str(tmp_path / "m.arrow"), ViewSpec("none", SIZE))


def requests(count: int) -> list[Request]:
    """Requests whose view is their number, so that readers can record it."""
    return [Request(np.arange(n, n + ROWS) % COUNT, n) for n in range(count)]


def settle(stream: ReaderPool) -> None:
    """Return when everything that was requested has been read, as under a slow trainer."""
    if isinstance(stream._readers, ray_readers.RayReaders):
        import ray

        asked = [a.reference for reader in stream._readers._readers for a in reader.asked]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=60)
        assert len(ready) == len(asked)
    else:
        done = concurrent.futures.Future
        futures = [a._future for a in held(stream)]
        assert all(isinstance(f, done) for f in futures)
        concurrent.futures.wait(futures, timeout=60)


def held(stream: ReaderPool) -> list[Any]:
    """Answers in flight."""
    import gc

    return [a for a in gc.get_objects() if type(a).__name__ == "_LocalAnswer"]


@backends
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 3), (3, 7)])
def test_what_is_read_ahead_is_the_prefetch(spec, backend, workers, prefetch):
    with ReaderPool(spec, backend=backend, workers=workers, prefetch=prefetch) as stream:
        folder = Path(spec.manifest).parent / "read"
        assert_read_ahead_is_the_prefetch(stream, requests(20), prefetch, folder, settle)


def store() -> Any:
    """Ray's own figures of the object store."""
    import ray
    from ray._private.internal_api import node_stats

    node = ray.nodes()[0]
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    return node_stats(*address, include_memory_info=False).store_stats


def used_at_most(limit: float) -> float:
    """The store's bytes in use, once below a limit: Ray frees memory with a delay."""
    deadline = time.monotonic() + 30
    while (used := store().object_store_bytes_used) > limit and time.monotonic() < deadline:
        time.sleep(0.1)
    return used


def test_pixels_of_actors_on_this_host_pass_beside_the_store(spec, ray_cluster):
    before = used_at_most(0)
    with ReaderPool(spec, backend="ray", workers=2, prefetch=5) as stream:
        loop = stream.batches(requests(40))
        for _ in range(10):
            next(loop)
        settle(stream)
        assert used_at_most(before + SLACK) - before <= SLACK
        loop.close()


def test_the_store_holds_the_prefetch_and_nothing_after(spec, ray_cluster, elsewhere):
    before = used_at_most(0)
    with ReaderPool(spec, backend="ray", workers=2, prefetch=5) as stream:
        loop = stream.batches(requests(40))
        for _ in range(10):
            next(loop)
        settle(stream)
        used = used_at_most(before + 5 * (BATCH_BYTES + SLACK)) - before
        assert 5 * BATCH_BYTES <= used <= 5 * (BATCH_BYTES + SLACK)
        loop.close()
        assert used_at_most(before) == before


def test_nothing_is_spilled_whatever_the_prefetch(spec, ray_cluster, capsys, console, elsewhere):
    spilled, capacity = store().spilled_bytes_total, ray_readers._store_bytes()
    assert capacity == store().object_store_bytes_avail
    many = int(2 * capacity / BATCH_BYTES)  # in flight they would overfill the store
    fits = int(capacity * ray_readers.STORE_SHARE / BATCH_BYTES)
    with ReaderPool(spec, backend="ray", workers=2, prefetch=many) as stream:
        loop = stream.batches(requests(many))
        found = [next(loop)]
        settle(stream)
        assert len([a for reader in stream._readers._readers for a in reader.asked]) == fits
        assert store().object_store_bytes_used <= fits * (BATCH_BYTES + SLACK) + BATCH_BYTES
        found += loop
    assert [int(batch.ids[0]) for batch in found] == [n % COUNT for n in range(many)]
    assert store().spilled_bytes_total == spilled
    said = capsys.readouterr().err
    assert said.count(f"{fits} requests in flight instead of {many}") == 1


def test_ranks_of_a_node_share_its_store(spec, ray_cluster, monkeypatch):
    with ReaderPool(spec, backend="ray", workers=1, prefetch=4) as stream:
        alone = stream._readers.depth(requests(1)[0], 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with ReaderPool(spec, backend="ray", workers=1, prefetch=4) as stream:
        assert stream._readers.depth(requests(1)[0], 1000) == alone // 4


def test_a_batch_larger_than_the_store_is_refused(spec, ray_cluster, monkeypatch):
    monkeypatch.setattr(ray_readers, "STORE_SHARE", BATCH_BYTES * 0.99 / ray_readers._store_bytes())
    with (
        ReaderPool(spec, backend="ray", workers=1, prefetch=4) as stream,
        pytest.raises(UserError, match=f"one batch of {ROWS} images takes 2 MB") as caught,
    ):
        list(stream.batches(requests(2)))
    assert "max_micro_batch" in caught.value.where


def test_what_an_abandoned_loop_had_asked_of_actors_is_cancelled(spec, ray_cluster, monkeypatch):
    """Ray's cancellation is a message that may arrive late: only its sending can be observed."""
    import ray

    cancelled, plain = [], ray.cancel
    monkeypatch.setattr(ray, "cancel", lambda one: (cancelled.append(one), plain(one)))
    monkeypatch.setattr(ray_readers, "ReaderActor", GatedActor)
    folder = Path(spec.manifest).parent
    with ReaderPool(spec, backend="ray", workers=1, prefetch=7) as stream:
        loop = stream.batches(requests(8))
        next(loop)
        wait_for(folder / "begun")
        asked = [answer.reference for answer in stream._readers._readers[0].asked]
        loop.close()  # the second is in progress, the others wait in the actor's queue
        assert cancelled == asked
        assert len(asked) == 7
        assert stream._readers._readers[0].asked == []
        (folder / "go").touch()
        (last,) = stream.batches([Request(np.array([3]), 99)])
    assert last.ids.tolist() == [3]
