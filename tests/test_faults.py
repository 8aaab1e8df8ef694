"""Exactly once under faults: readers are killed at random moments, and nothing is seen of it.

Every moment is a place in the run, not a time: "after batch n was received" (the test kills),
"before, while or after reading a request" (the reader kills itself with SIGKILL), "while
starting". Which ones, a seeded generator says.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import make_shards, random_images

from cnn2gnn_dist.data import actors
from cnn2gnn_dist.data.manifest import Manifest, index
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.pool import ReaderPool
from cnn2gnn_dist.data.reader import Batch, ReaderSpec, Request
from cnn2gnn_dist.data.views import ViewSpec

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


class Mortal(actors.ReaderActor):
    """A reader that the plan kills, and whose pid is known without asking it."""

    def __init__(self, spec):
        self.folder = Path(spec.manifest).parent
        self.die(f"start-{len(list((self.folder / 'pids').iterdir()))}")
        (self.folder / "pids" / str(os.getpid())).touch()
        super().__init__(spec)

    def read(self, ids, view):
        name = f"{view}-{ids[0]}"
        self.die(f"before-{name}")
        first = super().read(ids[: len(ids) // 2], view)
        self.die(f"within-{name}")
        assert len(first[0]) == len(ids) // 2
        answer = super().read(ids, view)
        self.die(f"after-{name}")
        return answer

    def die(self, moment):
        """SIGKILL to ourselves if the plan says so, once."""
        planned, done = self.folder / "plan" / moment, self.folder / "killed" / moment
        if planned.exists():
            with contextlib.suppress(FileNotFoundError):  # another reader has died for it
                planned.rename(done)
                os.kill(os.getpid(), signal.SIGKILL)


def kill_some(folder: Path, rng: random.Random, most: int) -> int:
    """SIGKILL to some of the readers that live, also those that are just starting."""
    alive = []
    for name in sorted((folder / "pids").iterdir(), key=lambda path: path.name):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(name.name))
            if process.status() != psutil.STATUS_ZOMBIE and "ray::" in process.name():
                alive.append(process)
    victims = rng.sample(alive, min(most, len(alive)))
    for process in victims:
        process.kill()
    return len(victims)


@pytest.mark.slow
def test_every_sample_exactly_once_under_fifty_kills(spec, ray_cluster, monkeypatch):
    monkeypatch.setattr(actors, "ReaderActor", Mortal)
    folder, rng = Path(spec.manifest).parent, random.Random(20)
    requests = requests_of(spec)
    plan = folder / "plan"
    plan.mkdir()
    for n in rng.sample(range(len(requests)), 24):
        moment = rng.choice(MOMENTS[1:])
        (plan / f"{moment}-{requests[n].view}-{requests[n].ids[0]}").touch()
    for n in rng.sample(range(WORKERS, WORKERS + 30), 4):
        (plan / f"start-{n}").touch()
    after = set(rng.sample(range(len(requests)), 16))

    with ReaderPool(spec, backend="local", workers=1, prefetch=1) as undisturbed:
        wanted = [bytes_of(batch) for batch in undisturbed.batches(requests)]
    found, kills = [], 0
    with ReaderPool(spec, backend="ray", workers=WORKERS, prefetch=5) as stream:
        for number, batch in enumerate(stream.batches(requests)):
            found.append(batch)
            if number in after:
                kills += kill_some(folder, rng, most=WORKERS)
    kinds = Counter(path.name.split("-")[0] for path in (folder / "killed").iterdir())

    assert kills + sum(kinds.values()) >= LEAST_KILLS, (kills, kinds)
    assert set(kinds) == set(MOMENTS), kinds
    assert [bytes_of(batch) for batch in found] == wanted
    per_epoch = len(requests) // EPOCHS
    for epoch in range(EPOCHS):
        ids = np.concatenate([b.ids for b in found[epoch * per_epoch : (epoch + 1) * per_epoch]])
        assert sorted(ids.tolist()) == list(range(SAMPLES))
