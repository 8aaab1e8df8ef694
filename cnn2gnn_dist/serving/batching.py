"""Dynamic batching: one thread runs the network over all waiting images.

There is no timed wait: a lone request is answered at once, and while the network runs the next
batch gathers. All images of a batch are answered from one version of the memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from cnn2gnn_dist.inference.answers import Answer
from cnn2gnn_dist.inference.classifier import BATCH, Classifier
from cnn2gnn_dist.inference.inputs import Pixels, even_size
from cnn2gnn_dist.serving.limits import Refused

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """Answers of a request, and the version of the memory that they come from (None: no memory)."""

    answers: list[Answer]
    version: int | None


@dataclass
class Job:
    """Images of one request; ``future`` receives the ``Answered``."""

    images: list[Pixels]
    top: int
    neighbours: int
    future: Future[Answered] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """A queue of requests, and the thread that answers them.

    Args:
        model: gives the model to answer with; asked once for each batch.
        waiting: most images that may wait.
        observe: called with (images, seconds in the network, longest wait in seconds) of a batch.
    """

    def __init__(
        self,
        model: Callable[[], Classifier],
        waiting: int,
        observe: Callable[[int, float, float], None] = lambda *_: None,
    ) -> None:
        self._model, self._limit, self._observe = model, waiting, observe
        self._jobs: deque[Job] = deque()
        self._images = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are accepted."""
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self._images

    def submit(self, images: list[Pixels], *, top: int, neighbours: int) -> Future[Answered]:
        """Queue images, all readable; cancel the future to withdraw them.

        Raises:
            Refused: the queue is full, or the server stops.
        """
        job = Job(images, top, neighbours)
        self.put(job)
        return job.future

    def put(self, job: Job) -> None:
        """As ``submit``, of images that are a job already.

        Raises:
            Refused: the queue is full, or the server stops.
        """
        with self._changed:
            if self._closed:
                raise Refused(503, "the server is stopping", "ask again", {"Retry-After": "5"})
            if self._images + len(job.images) > self._limit:
                raise Refused(
                    503, f"{self._images} images are already waiting", "ask again in a moment",
                    {"Retry-After": "1"},
                )  # fmt: skip
            self._jobs.append(job)
            self._images += len(job.images)
            self._changed.notify()

    def close(self) -> None:
        """Answer what is queued, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            answer_each(self._model, jobs, self._observe)

    def _next(self) -> list[Job]:
        """Wait for jobs; returns none when closed and empty."""
        jobs: list[Job] = []
        count = 0
        with self._changed:
            while not jobs:
                while not self._jobs:
                    if self._closed:
                        return []
                    self._changed.wait()
                while self._jobs and (not jobs or count + len(self._jobs[0].images) <= BATCH):
                    job = self._jobs.popleft()
                    self._images -= len(job.images)
                    if job.future.set_running_or_notify_cancel():
                        jobs.append(job)
                        count += len(job.images)
        return jobs


def answer_each(
    model: Callable[[], Classifier],
    jobs: list[Job],
    observe: Callable[[int, float, float], None] = lambda *_: None,
) -> None:
    """As ``answer``; if that fails, each request is tried alone, and its future gets its own error."""
    try:
        answer(model(), jobs, observe)
    except Exception:
        _log.exception("a batch of %d requests failed; each is tried alone", len(jobs))
        for job in jobs:
            if job.future.done():
                continue
            try:
                answer(model(), [job], observe)
            except Exception as error:
                job.future.set_exception(error)


def answer(
    model: Classifier,
    jobs: list[Job],
    observe: Callable[[int, float, float], None] = lambda *_: None,
) -> None:
    """Answer requests together, all from the model's current memory.

    With ``graph.scope=batch`` images are each other's neighbors, so requests are kept apart, each in the batches of
    ``Classifier.predict``.
    """
    memory = model.memory
    version = None if memory is None else memory.version.number
    start = time.monotonic()
    longest = max(start - job.since for job in jobs)
    apart = model.spec.scope == "batch"
    for group in [[job] for job in jobs] if apart else [jobs]:
        images = [one for job in group for one in job.images]
        top = max(job.top for job in group)
        neighbours = max(job.neighbours for job in group)
        found: list[Answer] = []
        size = even_size(len(images), BATCH) if apart else BATCH
        for at in range(0, len(images), size):
            part = images[at : at + size]
            found += model.answers(part, memory, top=top, neighbours=neighbours)
        for job in group:
            mine, found = found[: len(job.images)], found[len(job.images) :]
            job.future.set_result(Answered([_cut(one, job) for one in mine], version))
    observe(sum(len(job.images) for job in jobs), time.monotonic() - start, longest)


def _cut(one: Answer, job: Job) -> Answer:
    return replace(one, classes=one.classes[: job.top], neighbours=one.neighbours[: job.neighbours])
