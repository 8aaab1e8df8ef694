"""What a replica does with what Serve gives it: the class itself, without Ray."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.serving import ray_app
from cnn2gnn_dist.serving.batching import Job
from cnn2gnn_dist.serving.limits import Refused
from tests.support.models import pictures, write_model
from tests.unit.serving.test_batching import Poisoned, images


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m")


@pytest.fixture
def replica(model: Path) -> Iterator[Any]:
    own = ray_app.Replica.func_or_class.__mro__[1]  # Serve's wrapper asks for a running replica
    made = own({"model": str(model), "device": "cpu"})
    yield made
    made.service.closing()


def answer(replica: Any, jobs: list[Job]) -> Any:
    """As Serve calls it with one of its batches."""
    return type(replica).answer.__wrapped__(replica, jobs)


def test_a_request_that_breaks_its_batch_fails_alone(replica: Any, model: Path):
    replica.live.current.__class__ = Poisoned
    bad = Job([Pixels("poison", pictures(1)[0])], 1, 0)
    jobs = [Job(images(2), 1, 0), bad, Job(images(3, 5), 2, 1)]
    first, error, last = asyncio.run(answer(replica, jobs))
    assert isinstance(error, ArithmeticError)
    apart = Classifier.open(model, device="cpu")
    assert first.answers == apart.answers(images(2), apart.memory, top=1, neighbours=0)
    assert last.answers == apart.answers(images(3, 5), apart.memory, top=2, neighbours=1)


def hold(replica: Any) -> tuple[threading.Event, threading.Event]:
    """Let the network wait; returns events: it was asked, it may go on."""
    asked, go, inner = threading.Event(), threading.Event(), replica.live.current.network

    def wait(*arguments: object) -> object:
        asked.set()
        assert go.wait(60)
        return inner(*arguments)

    replica.live.current.network = wait
    return asked, go


def test_what_arrives_while_the_network_runs_is_answered_together(replica: Any):
    """Under load Serve makes a batch of each request: it only waits once it has taken one."""
    asked, go = hold(replica)

    async def ask() -> list[Any]:
        batches = [[Job(images(1, n), 1, 0)] for n in range(65)]
        batches.append([Job(images(64), 1, 0) for _ in range(32)])
        tasks = [asyncio.create_task(answer(replica, batches[0]))]
        await asyncio.to_thread(asked.wait, 60)
        tasks += [asyncio.create_task(answer(replica, batch)) for batch in batches[1:]]
        while replica.batcher.waiting < 64 + 31 * 64:
            await asyncio.sleep(0)
        go.set()
        return [one for task in tasks for one in await task]

    made = asyncio.run(ask())
    refused = [one for one in made if isinstance(one, Refused)]
    assert [one.what for one in refused] == ["2048 images are already waiting"]
    assert len([one for one in made if one not in refused]) == 65 + 31
    replica.service.closing()
    text = replica.service.metrics.text().decode()
    assert "cnn2gnn_batch_images_count 33.0" in text, "1 image, 64 of 64 requests, 31 of 64 each"
    assert re.search(r'cnn2gnn_batch_images_bucket\{le="1.0"\} 1.0', text)


def test_a_request_that_nobody_waits_for_any_more_is_not_computed(replica: Any):
    asked, go = hold(replica)
    withdrawn = Job(images(5), 1, 0)

    async def ask() -> None:
        first = asyncio.create_task(answer(replica, [Job(images(1), 1, 0)]))
        await asyncio.to_thread(asked.wait, 60)
        other = asyncio.create_task(answer(replica, [withdrawn]))
        while replica.batcher.waiting < 5:
            await asyncio.sleep(0)
        withdrawn.future.cancel()
        go.set()
        await first
        (made,) = await other
        assert isinstance(made, asyncio.CancelledError)

    asyncio.run(ask())
    replica.service.closing()
    assert "cnn2gnn_batch_images_sum 1.0" in replica.service.metrics.text().decode()


def test_a_version_that_is_not_there_leaves_a_replica_as_it_was(
    replica: Any, model: Path, caplog: pytest.LogCaptureFixture
):
    """If it raised, Serve would stop the replica."""

    def reconfigure(number: int | None) -> None:
        asyncio.run(replica.reconfigure({"memory_version": number}))

    with pytest.raises(UserError):
        reconfigure(99)  # at the start, there is nothing to go on with
    reconfigure(None)
    with caplog.at_level(logging.ERROR):
        reconfigure(99)
    assert "version 99 of the memory can't be loaded, still answering from version 0" in caplog.text
    assert not replica.live.pinned
    editing.remove(Classifier.open(model, device="cpu"), ["img-1"])
    assert replica.live.follow(), "it still follows the memory"
    reconfigure(0)
    reconfigure(99)
    assert (replica.live.version, replica.live.pinned) == (0, True)
