"""The reader pool: stateless readers, pulled in order, a few requests in flight.

One of the two rooms in which Ray is met. A reader actor holds nothing but caches: when it
dies, Ray starts another and its request is asked again. Exactly-once follows from purity.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from cnn2gnn_dist.data.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.errors import UserError

MOST_FAILURES = 10
"""Deaths on one request after which the request is to blame."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 3.0
"""Seconds before asking again, doubling: a reader needs about one to come back."""


class ReaderPool:
    """Batches in the order of their requests; one loop over them at a time.

    Args:
        spec: what readers open.
        backend: "ray" (reader actors beside this process) or "local" (threads).
        workers: readers.
        prefetch: requests in flight.
        name: readable prefix of the actors' names.

    Attributes:
        wait_seconds: time the consumer has waited for batches so far.

    Raises:
        UserError: unknown backend; Ray is asked for and not initialised.
    """

    def __init__(
        self, spec: ReaderSpec, *, backend: str, workers: int, prefetch: int, name: str = "stream"
    ) -> None:
        if workers < 1 or prefetch < 1:
            raise UserError(
                f"a stream of {workers} workers and {prefetch} requests in flight",
                where="stream.workers, stream.prefetch",
                remedy="at least 1 for each; 4 requests in flight are enough",
            )
        self.prefetch = prefetch
        self.wait_seconds = 0.0
        if backend == "ray":
            self._readers: _RayReaders | _LocalReaders = _RayReaders(spec, workers, name)
        elif backend == "local":
            self._readers = _LocalReaders(spec, workers)
        else:
            raise UserError(
                f"no backend {backend!r}", where="stream.backend", remedy="ray, local or auto"
            )

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Read all requests, taken lazily; what is in flight when the caller stops is dropped.

        Raises:
            UserError: a shard is missing or changed; readers keep dying on one request.
        """
        waiting: deque[_Answer] = deque()
        source = iter(requests)
        try:
            self._fill(waiting, source)
            while waiting:
                batch = self._take(waiting.popleft())
                self._fill(waiting, source)  # before the caller computes, not after
                yield batch
        finally:
            for answer in waiting:
                answer.drop()

    def _fill(self, waiting: deque[_Answer], source: Iterator[Request]) -> None:
        for request in itertools.islice(source, self.prefetch - len(waiting)):
            waiting.append(self._readers.ask(request))

    def close(self) -> None:
        """End the readers."""
        self._readers.close()

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, answer: _Answer) -> Batch:
        began = time.perf_counter()
        try:
            return answer.wait()
        finally:
            self.wait_seconds += time.perf_counter() - began


class _Answer(Protocol):
    """A request in flight."""

    def wait(self) -> Batch:
        """The batch, when it is there."""

    def drop(self) -> None:
        """Nobody wants it any more."""


class _LocalReaders:
    """The same readers in threads of this process."""

    def __init__(self, spec: ReaderSpec, workers: int) -> None:
        # One for each thread: they would race on one table of open shards.
        self._free = deque(Reader(spec) for _ in range(workers))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")

    def ask(self, request: Request) -> _Answer:
        return _LocalAnswer(self._pool.submit(self._read, request))

    def _read(self, request: Request) -> Batch:
        reader = self._free.popleft()
        try:
            return reader.read(request)
        finally:
            self._free.append(reader)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._free:
            reader.close()


class _LocalAnswer:
    def __init__(self, future: Future[Batch]) -> None:
        self._future = future

    def wait(self) -> Batch:
        return self._future.result()

    def drop(self) -> None:
        self._future.cancel()


class _RayReaders:
    """Reader actors on this node, asked in turn."""

    def __init__(self, spec: ReaderSpec, workers: int, name: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not ray.is_initialized():
            raise UserError(
                "Ray is not running in this process",
                where="stream.backend=ray",
                remedy="start through `cnn2gnn run`, or stream.backend=local",
            )
        Reader(spec).close()  # what can't be opened is said here, not by a dying actor
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(_ReaderActor)
        how = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0}
        tag = uuid.uuid4().hex[:6]
        self._actors = [
            actor.options(name=f"{name}-{number}-{tag}", scheduling_strategy=here, **how).remote(
                spec
            )
            for number in range(workers)
        ]
        self._turn = 0

    def ask(self, request: Request) -> _Answer:
        actor = self._actors[self._turn % len(self._actors)]
        self._turn += 1
        return _RayAnswer(actor, request)

    def close(self) -> None:
        import ray

        if ray.is_initialized():  # after its end the actors are gone anyway
            for actor in self._actors:
                ray.kill(actor)
        self._actors = []


class _RayAnswer:
    """A request that is asked again when its reader dies."""

    def __init__(self, actor: Any, request: Request) -> None:
        self._actor, self._request = actor, request
        self._ask()

    def _ask(self) -> None:
        self._reference = self._actor.read.remote(self._request.ids, self._request.view)

    def wait(self) -> Batch:
        import ray
        from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

        failures = 0
        while True:
            try:
                images, labels, ids, valid, problems = ray.get(self._reference)
                # Views of the object store pin it: copy once, then let go.
                return Batch(images.copy(), labels.copy(), ids.copy(), valid.copy(), problems)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            except (RayActorError, OutOfMemoryError, ObjectLostError) as error:
                failures += 1
                if failures == MOST_FAILURES:
                    raise self._hopeless(error) from error
            time.sleep(min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE))
            self._ask()

    def _hopeless(self, error: Exception) -> UserError:
        return UserError(
            f"a reader died {MOST_FAILURES} times on one request: {error}",
            where=f"sample ids {self._request.ids[:4].tolist()}…, view {self._request.view}",
            remedy="see the readers' logs (in Ray's session folder); memory is the usual reason: "
            "fewer stream.workers, a smaller stream.prefetch",
        )

    def drop(self) -> None:
        self._reference = None  # Ray frees the result with its last reference


class _ReaderActor:
    """A reader in a process of its own."""

    def __init__(self, spec: ReaderSpec) -> None:
        import torch

        torch.set_num_threads(1)
        self._reader = Reader(spec)

    def read(self, ids: np.ndarray, view: int) -> tuple[Any, ...]:
        batch = self._reader.read(Request(ids, view))
        return batch.images, batch.labels, batch.ids, batch.valid, batch.problems

    def process_id(self) -> int:
        import os

        return os.getpid()
