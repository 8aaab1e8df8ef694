"""Batching: requests that wait together are answered together, and none is lost."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from cnn2gnn_dist.inference.answers import Answer
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.serving.batching import Batcher
from cnn2gnn_dist.serving.limits import Refused
from tests.support.models import pictures, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return Classifier.open(write_model(tmp_path_factory.mktemp("m") / "model"), device="cpu")


class Held:
    """A batcher whose network waits until ``go``."""

    def __init__(self, model: Classifier, waiting: int = 1000) -> None:
        self.batches: list[int] = []
        self.asked = threading.Semaphore(0)
        self._go = threading.Event()
        self._model = model
        self.batcher = Batcher(
            self._when_let, waiting, lambda images, *_: self.batches.append(images)
        )

    def _when_let(self) -> Classifier:
        self.asked.release()
        self._go.wait()
        return self._model

    def go(self) -> None:
        self._go.set()


def images(count: int, seed: int = 3) -> list[Pixels]:
    return [Pixels(f"{seed}/{n}", one) for n, one in enumerate(pictures(count, seed))]


def test_what_waits_is_answered_together_and_as_if_alone(model: Classifier):
    held = Held(model)
    sizes = [1, 3, 2, 30, 40, 1]
    jobs = [(images(size, seed), held.batcher.submit(images(size, seed), top=3, neighbours=2))
            for seed, size in enumerate(sizes)]  # fmt: skip
    held.asked.acquire()  # the first request is being computed, alone
    held.go()
    for given, future in jobs:
        made = future.result(timeout=60)
        assert made.version == 0
        assert made.answers == model.answers(given, model.memory, top=3, neighbours=2)
    held.batcher.close()
    assert sum(held.batches) == sum(sizes)
    assert max(held.batches) <= 64
    assert len(held.batches) < len(sizes)


def test_each_request_gets_as_many_classes_as_it_asked_for(model: Classifier):
    held = Held(model)
    few = held.batcher.submit(images(2), top=1, neighbours=0)
    many = held.batcher.submit(images(2), top=3, neighbours=4)
    held.go()
    assert [len(one.classes) for one in few.result(60).answers] == [1, 1]
    assert [len(one.neighbours) for one in few.result(60).answers] == [0, 0]
    assert [len(one.classes) for one in many.result(60).answers] == [3, 3]
    held.batcher.close()


def test_a_full_queue_refuses(model: Classifier):
    held = Held(model, waiting=4)
    held.batcher.submit(images(1), top=1, neighbours=0)
    held.asked.acquire()
    held.batcher.submit(images(4), top=1, neighbours=0)
    assert held.batcher.waiting == 4
    with pytest.raises(Refused, match="4 images are already waiting") as refused:
        held.batcher.submit(images(1), top=1, neighbours=0)
    assert refused.value.status == 503
    held.go()
    held.batcher.close()


def test_withdrawn_requests_are_not_computed(model: Classifier):
    held = Held(model)
    first = held.batcher.submit(images(1), top=1, neighbours=0)
    held.asked.acquire()
    withdrawn = held.batcher.submit(images(5), top=1, neighbours=0)
    assert withdrawn.cancel()
    held.go()
    assert first.result(60).answers
    last = held.batcher.submit(images(2), top=1, neighbours=0)
    assert last.result(60).answers
    with pytest.raises(CancelledError):
        withdrawn.result()
    held.batcher.close()
    assert held.batches == [1, 2]


def test_closing_answers_what_is_queued_and_takes_no_more(model: Classifier):
    held = Held(model)
    futures = [held.batcher.submit(images(40, seed), top=1, neighbours=0) for seed in range(4)]
    closing = threading.Thread(target=held.batcher.close)
    closing.start()
    held.go()
    closing.join(60)
    assert all(len(future.result(0).answers) == 40 for future in futures)
    assert not held.batcher.alive
    with pytest.raises(Refused, match="stopping"):
        held.batcher.submit(images(1), top=1, neighbours=0)


class Poisoned(Classifier):
    """A model that fails on one image."""

    def answers(self, images: list[Pixels], *rest: object, **more: object) -> list[Answer]:
        if any(one.name == "poison" for one in images):
            raise ArithmeticError("poison")
        return super().answers(images, *rest, **more)  # type: ignore[arg-type]


def test_a_request_that_breaks_its_batch_fails_alone(model: Classifier):
    poisoned = copy.copy(model)
    poisoned.__class__ = Poisoned
    held = Held(poisoned)
    held.batcher.submit(images(1), top=1, neighbours=0)
    held.asked.acquire()
    good = held.batcher.submit(images(2), top=1, neighbours=0)
    bad = held.batcher.submit([Pixels("poison", pictures(1)[0])], top=1, neighbours=0)
    after = held.batcher.submit(images(3), top=1, neighbours=0)
    held.go()
    assert len(good.result(60).answers) == 2
    assert len(after.result(60).answers) == 3
    with pytest.raises(ArithmeticError):
        bad.result(60)
    assert held.batcher.alive
    held.batcher.close()


def test_a_large_request_to_a_batch_scope_model_is_divided_as_by_predict(tmp_path: Path):
    """A last image alone would have no neighbors."""
    model = Classifier.open(write_model(tmp_path / "m", scope="batch"), device="cpu")
    batcher = Batcher(lambda: model, 1000)
    made = batcher.submit(images(65), top=3, neighbours=0).result(60)
    batcher.close()
    assert [one.classes for one in made.answers] == [
        one.classes for one in model.predict(pictures(65, 3), top=3, neighbours=0)
    ]


def test_requests_to_a_batch_scope_model_do_not_meet(tmp_path: Path):
    model = Classifier.open(write_model(tmp_path / "m", scope="batch"), device="cpu")
    held = Held(model)
    jobs = [held.batcher.submit(images(3, seed), top=1, neighbours=0) for seed in range(4)]
    held.go()
    for seed, job in enumerate(jobs):
        assert job.result(60).answers == model.answers(images(3, seed), None, top=1, neighbours=0)
        assert job.result(60).version is None
    held.batcher.close()
