"""The reader pool: stateless readers that answer requests in order, with a few in flight.

Threads of this process, processes (:mod:`.process_readers`) and Ray actors (:mod:`.ray_readers`) give the same bytes
in the same order.
Readers work only on the requests in flight: when the consumer stops asking, they stop.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

from cnn2gnn_dist.data.images.crops import crops_of
from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.errors import UserError

CLOSING_SECONDS = 10.0
"""Time that a reading thread has to finish its request when the stream closes."""


class ReaderPool:
    """Batches in the order of their requests; supports one loop over them at a time.

    Args:
        spec: specification of the readers.
        backend: "ray" (reader actors on this node), "local" (threads), "processes" (children of this
            process), or "auto": ray if it is initialized in this process, else local. Views with a hook are
            read in processes instead of threads: a hook draws from the generators of its process.
        workers: number of readers.
        prefetch: maximum requests in flight: queued, being read, or read and not yet consumed. Reduced,
            with a message, if they would not fit into Ray's object store.
        name: readable prefix of the actors' names.
        resources: custom Ray resources that a reader actor requires (see ``RayReaders``).

    Attributes:
        wait_seconds: total time the consumer has waited for batches.

    Raises:
        UserError: unknown backend; Ray is requested but not initialized.
    """

    def __init__(
        self,
        spec: ReaderSpec,
        *,
        backend: str,
        workers: int,
        prefetch: int,
        name: str = "stream",
        resources: Mapping[str, float] | None = None,
    ) -> None:
        if workers < 1 or prefetch < 1:
            raise UserError(
                f"a stream of {workers} workers and {prefetch} requests in flight",
                where="stream.workers, stream.prefetch",
                remedy="set each to at least 1; 4 requests in flight are enough",
            )
        self.prefetch = self._depth = prefetch
        self.wait_seconds = 0.0
        if backend == "auto":
            backend = "ray" if _ray_runs() else "local"
        if backend == "local" and any(group.views.hook for group in crops_of(spec.views)):
            backend = (
                "processes"  # in threads a hook and training would take each other's random numbers
            )
        if backend == "ray":
            from cnn2gnn_dist.data.reading.ray_readers import RayReaders

            self._readers: _Readers = RayReaders(spec, workers, name, resources)
        elif backend == "processes":
            from cnn2gnn_dist.data.reading.process_readers import ProcessReaders

            self._readers = ProcessReaders(spec, workers)
        elif backend == "local":
            self._readers = _LocalReaders(spec, workers)
        else:
            raise UserError(
                f"unknown backend {backend!r}",
                where="stream.backend",
                remedy="use ray, local, processes or auto",
            )

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Read all requests, consuming them lazily; those in flight when the caller stops are dropped.

        Raises:
            UserError: a shard is missing or changed; readers keep dying on one request; a batch
                does not fit into Ray's object store.
        """
        waiting: deque[_Answer] = deque()
        self._depth = self.prefetch
        source = iter(requests)
        try:
            self._fill(waiting, source)
            while waiting:
                batch = self._take(waiting.popleft())
                self._fill(waiting, source)  # refill before the caller computes
                yield batch
        finally:
            for answer in waiting:
                answer.drop()

    def _fill(self, waiting: deque[_Answer], source: Iterator[Request]) -> None:
        while len(waiting) < self._depth:
            request = next(source, None)
            if request is None:
                return
            self._depth = self._readers.depth(request, self.prefetch)
            waiting.append(self._readers.ask(request))

    def close(self) -> None:
        """Stop the readers."""
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


def _ray_runs() -> bool:
    # No import here: if Ray runs in this process, it has been imported.
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


class _Answer(Protocol):
    """A request in flight."""

    def wait(self) -> Batch:
        """Wait for the batch and return it."""

    def drop(self) -> None:
        """Discard the request."""


class _Readers(Protocol):
    """A set of readers."""

    def ask(self, request: Request) -> _Answer:
        """Queue a request."""

    def depth(self, request: Request, prefetch: int) -> int:
        """Return how many requests of this size may be in flight."""

    def close(self) -> None:
        """Stop the readers."""


class _LocalReaders:
    """Readers in threads of this process."""

    def __init__(self, spec: ReaderSpec, workers: int) -> None:
        # One reader per thread: they would race on a shared table of open shards.
        self._free = deque(Reader(spec) for _ in range(workers))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")

    def ask(self, request: Request) -> _Answer:
        return _LocalAnswer(self._pool.submit(self._read, request))

    def depth(self, request: Request, prefetch: int) -> int:
        return prefetch

    def _read(self, request: Request) -> Batch:
        reader = self._free.popleft()
        try:
            return reader.read(request)
        finally:
            self._free.append(reader)

    def close(self) -> None:
        """Stop the readers; one that waits for a lost file server is left behind, or it would keep the process."""
        # An executor's own wait has no limit.
        end = partial(self._pool.shutdown, wait=True, cancel_futures=True)
        closing = threading.Thread(target=end, daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)
        while self._free:
            self._free.popleft().close()


class _LocalAnswer:
    def __init__(self, future: Future[Batch]) -> None:
        self._future = future

    def wait(self) -> Batch:
        return self._future.result()

    def drop(self) -> None:
        self._future.cancel()
