"""Every sample exactly once under faults: readers are killed at random points, without any visible effect.

Each point is a place in the run, not a time: "after batch n was received" (the test kills), "before, while
or after reading a request" (the reader kills itself with SIGKILL), "while starting". A seeded generator
chooses the points.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.reading import ray_readers
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Batch, ReaderSpec, Request
from cnn2gnn_dist.errors import UserError
from tests.support.odd_actors import MortalActor, PoisonedActor, StillbornActor, mark_dead
from tests.support.shards import make_shards, random_images

pytestmark = pytest.mark.ray

SAMPLES, BATCH, EPOCHS, WORKERS = 320, 8, 3, 3
LEAST_KILLS = 50
MOMENTS = ("start", "before", "within", "after")


@pytest.fixture
def spec(tmp_path: Path) -> ReaderSpec:
    images = random_images(SAMPLES, 40, 40)
    shards = make_shards(tmp_path / "s", images, np.arange(SAMPLES) % 7, shard_size=24)
    index(shards, progress=False).save(tmp_path / "m.arrow")
    for name in ("killed", "pids"):
        (tmp_path / name).mkdir()
    return ReaderSpec(str(tmp_path / "m.arrow"), ViewSpec("crop_flip", 40, seed=5))


def requests_of(spec: ReaderSpec) -> list[Request]:
    """All requests of some epochs."""
    order = Order(Manifest.load(spec.manifest).shard_sizes, seed=3, global_batch=BATCH, window=4)
    assert order.batches_per_epoch * BATCH == SAMPLES
    numbers = range(order.batches_per_epoch)
    return [Request(order.batch(epoch, n), epoch) for epoch in range(EPOCHS) for n in numbers]


def bytes_of(batch: Batch) -> tuple:
    arrays = (batch.images, batch.labels, batch.ids, batch.valid)
    return *((a.dtype.str, a.shape, a.tobytes()) for a in arrays), tuple(batch.problems)


def kill_some(folder: Path, rng: random.Random, most: int) -> int:
    """Send SIGKILL to some of the running readers, including those that are starting; return how many."""
    alive: list[psutil.Process] = []
    if most == 0:
        return 0
    for path in sorted((folder / "pids").glob("[0-9]*")):
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            process = psutil.Process(int(path.name))
            if "ray::" in process.name():
                alive.append(process)
    killed = 0
    for process in rng.sample(alive, min(most, len(alive))):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just killed itself
            process.kill()
            mark_dead(folder / "pids" / str(process.pid))
            killed += 1
    return killed


def test_every_sample_exactly_once_under_fifty_kills(spec, ray_cluster, monkeypatch):
    monkeypatch.setattr(ray_readers, "ReaderActor", MortalActor)
    folder, rng = Path(spec.manifest).parent, random.Random(20)
    requests = requests_of(spec)
    plan = folder / "plan"
    plan.mkdir()
    for n in rng.sample(range(len(requests)), 18):
        moment = rng.choice(MOMENTS[1:])
        (plan / f"{moment}-{requests[n].view}-{requests[n].ids[0]}").touch()
    for n in rng.sample(range(WORKERS, WORKERS + 30), 3):
        (plan / f"start-{n}").touch()
    after = set(rng.sample(range(len(requests) - 20), 11))

    with ReaderPool(spec, backend="local", workers=1, prefetch=1) as undisturbed:
        wanted = [bytes_of(batch) for batch in undisturbed.batches(requests)]
    found, kills, due = [], 0, 0
    with ReaderPool(spec, backend="ray", workers=WORKERS, prefetch=5) as stream:
        for number, batch in enumerate(stream.batches(requests)):
            found.append(batch)
            due += WORKERS * (number in after)
            killed = kill_some(folder, rng, most=due)  # kills without a running reader come later
            kills, due = kills + killed, due - killed
    kinds = Counter(path.name.split("-")[0] for path in (folder / "killed").iterdir())

    print(f"{kills} killed from outside, {dict(kinds)} by themselves")
    assert kills + sum(kinds.values()) >= LEAST_KILLS, (kills, kinds)
    assert set(kinds) == set(MOMENTS), kinds
    assert [bytes_of(batch) for batch in found] == wanted
    per_epoch = len(requests) // EPOCHS
    for epoch in range(EPOCHS):
        ids = np.concatenate([b.ids for b in found[epoch * per_epoch : (epoch + 1) * per_epoch]])
        assert sorted(ids.tolist()) == list(range(SAMPLES))


@pytest.mark.parametrize("workers", [1, 2])
def test_whoever_kills_readers_is_blamed_and_not_its_neighbours(
    spec, ray_cluster, monkeypatch, workers
):
    monkeypatch.setattr(ray_readers, "ReaderActor", PoisonedActor)
    monkeypatch.setattr(ray_readers, "MOST_DEATHS", 3)
    requests = [Request(np.array([n, n + 100]), n) for n in range(16)]
    found = []
    with ReaderPool(spec, backend="ray", workers=workers, prefetch=8) as stream:
        with pytest.raises(UserError, match="died 3 times on one request") as caught:
            found.extend(stream.batches(requests))
        assert caught.value.where.startswith("sample ids [7, 107]")
        # Requests that were pending next to it have been repeated, not dropped; the rest can be read.
        assert [batch.ids[0] for batch in found] == list(range(len(found)))
        assert len(found) <= 7
        rest = [request for request in requests if request.view != 7]
        with ReaderPool(spec, backend="local", workers=1, prefetch=1) as undisturbed:
            wanted = [bytes_of(batch) for batch in undisturbed.batches(rest)]
        assert [bytes_of(batch) for batch in stream.batches(rest)] == wanted


def test_a_reader_gone_for_good_is_replaced(spec, ray_cluster):
    import ray

    requests = [Request(np.arange(n, n + 6), 1) for n in range(12)]
    found = []
    with ReaderPool(spec, backend="ray", workers=2, prefetch=4) as stream:
        for number, batch in enumerate(stream.batches(requests)):
            found.append(batch)
            if number in (1, 6):
                ray.kill(stream._readers._readers[0].actor)  # Ray won't restart it
    with ReaderPool(spec, backend="local", workers=1, prefetch=1) as undisturbed:
        assert [bytes_of(b) for b in found] == [bytes_of(b) for b in undisturbed.batches(requests)]


def test_readers_that_cannot_start_say_why(spec, ray_cluster, monkeypatch):
    monkeypatch.setattr(ray_readers, "ReaderActor", StillbornActor)
    with (
        ReaderPool(spec, backend="ray", workers=1, prefetch=2) as stream,
        pytest.raises(UserError, match="can't be started: ImportError: no such library"),
    ):
        list(stream.batches([Request(np.arange(4), 0)]))
