"""The stream: stateless readers, pulled in order, a few requests in flight.

One of the two rooms in which Ray is met. A reader actor holds nothing but caches: when it
dies, Ray starts another and its request is asked again. Exactly-once follows from purity.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from cnn2gnn_dist.data.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.errors import UserError

MOST_FAILURES = 10


class Stream:
    """Batches in the order of their requests.

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
        self.prefetch = max(prefetch, 1)
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
        """Read all requests, lazily; what is in flight when the caller stops is dropped."""
        waiting: deque[Callable[[], Batch]] = deque()
        source = iter(requests)
        for request in source:
            waiting.append(self._readers.ask(request))
            if len(waiting) >= self.prefetch:
                yield self._take(waiting.popleft())
        while waiting:
            yield self._take(waiting.popleft())

    def close(self) -> None:
        """End the readers."""
        self._readers.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, answer: Callable[[], Batch]) -> Batch:
        began = time.perf_counter()
        try:
            return answer()
        finally:
            self.wait_seconds += time.perf_counter() - began


class _LocalReaders:
    """The same reader in threads of this process."""

    def __init__(self, spec: ReaderSpec, workers: int) -> None:
        self._reader = Reader(spec)
        # One reader for all threads would race on its table of open shards.
        self._free = deque([self._reader, *(Reader(spec) for _ in range(workers - 1))])
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")

    def ask(self, request: Request) -> Callable[[], Batch]:
        future: Future[Batch] = self._pool.submit(self._read, request)
        return future.result

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
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(
            num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy=here
        )(_ReaderActor)
        tag = uuid.uuid4().hex[:6]
        self._actors = [
            actor.options(name=f"{name}-{number}-{tag}").remote(spec) for number in range(workers)
        ]
        self._turn = 0

    def ask(self, request: Request) -> Callable[[], Batch]:
        actor = self._actors[self._turn % len(self._actors)]
        self._turn += 1
        reference = actor.read.remote(request.ids, request.view)
        return lambda: self._answer(actor, request, reference)

    def _answer(self, actor: Any, request: Request, reference: Any) -> Batch:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        last: Exception | None = None
        for _ in range(MOST_FAILURES):
            try:
                images, labels, ids, valid, problems = ray.get(reference)
                # Views of the object store pin it: copy once, then let go.
                return Batch(np.array(images), np.array(labels), ids.copy(), valid.copy(), problems)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            except RayActorError as error:
                last = error
                reference = actor.read.remote(request.ids, request.view)
        raise UserError(
            f"a reader died {MOST_FAILURES} times on one request: {last}",
            where=f"sample ids {request.ids[:4].tolist()}…",
            remedy="see the readers' logs; memory is the usual reason",
        )

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


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
