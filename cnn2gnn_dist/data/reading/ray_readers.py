"""Reader actors: one of the two modules that import Ray.

A reader actor has no state but caches. When it dies, Ray restarts it, and its unanswered requests are
immediately reassigned to the living readers. Since reading is a pure function, each batch is delivered
exactly once. This module also limits the data in flight to what fits into Ray's object store, which
would otherwise spill to disk silently.

Actors on this host write pixels into memory that this process lends them (:mod:`.shared_batches`), so that nothing
is copied into the object store and out of it. Memory of a request that was lost or dropped is never lent again: an
actor that Ray takes for dead may still be writing.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cnn2gnn_dist.data.images.crops import crops_of, pixel_bytes
from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.data.reading.reader_actor import ReaderActor, batch_of
from cnn2gnn_dist.data.reading.shared_batches import Buffer, Layout, Lender
from cnn2gnn_dist.errors import UserError, last_line
from cnn2gnn_dist.runtime.ray.session import exit_code_kept

_log = logging.getLogger(__name__)

MOST_DEATHS = 10
"""Number of readers that may die while reading one request before the request is blamed."""
RESTART_SECONDS = 120.0
"""Timeout for a dead reader to restart, which takes about two seconds."""
STORE_SHARE = 0.5
"""Fraction of the object store for the data in flight of all streams on a node; Ray spills from 0.8 on."""

LOST = (RayActorError, OutOfMemoryError, ObjectLostError)


class RayReaders:
    """Reader actors on this node, used round-robin.

    Args:
        spec: specification of the readers.
        workers: number of actors.
        name: prefix of the actors' names.
        resources: custom resources that an actor requires; the actors are then spread over the nodes that
            have them, instead of all running on this node.

    Raises:
        UserError: Ray is not initialized in this process; the spec can't be opened; no node has
            the resources.
    """

    def __init__(
        self,
        spec: ReaderSpec,
        workers: int,
        name: str,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        if not ray.is_initialized():
            raise UserError(
                "Ray is not running in this process",
                where="stream.backend=ray",
                remedy="start with `cnn2gnn run`, or set stream.backend=local",
            )
        Reader(spec).close()  # fail here, not in a dying actor
        _check_resources(resources or {})
        self._groups = crops_of(spec.views)
        self._row_bytes = pixel_bytes(spec.views) + 17  # images, label, id, valid
        self._room = _store_bytes() * STORE_SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._warned = False
        tag = uuid.uuid4().hex[:6]
        names = (f"{name}-{number}-{tag}" for number in range(workers))
        self._readers = [_Reader(spec, one, resources or {}) for one in names]
        self._turn = itertools.cycle(self._readers)
        self._numbers = itertools.count()
        self._parked: list[RayAnswer] = []

    def ask(self, request: Request) -> RayAnswer:
        """Send a request to the next living reader; park it while none is alive."""
        layout = Layout(self._groups, len(request.ids), request.view)
        answer = RayAnswer(self, request, layout, next(self._numbers))
        self._assign([answer])
        return answer

    def depth(self, request: Request, prefetch: int) -> int:
        """Return how many requests of this size may be in flight: ``prefetch``, or as many as fit.

        Raises:
            UserError: not even one fits.
        """
        size = len(request.ids) * self._row_bytes
        fits = int(self._room // size) if size else prefetch
        if fits < 1:
            raise UserError(
                f"one batch of {len(request.ids)} images takes {size / 2**20:,.0f} MB, but a "
                f"stream gets {self._room / 2**20:,.0f} MB of Ray's object store",
                where="max_micro_batch, stream.backend=ray",
                remedy="use smaller batches, stream.backend=local, or a larger object store "
                "(more shared memory: docker --shm-size)",
            )
        if fits < prefetch and not self._warned:
            self._warned = True
            _log.warning(
                f"stream: {fits} requests in flight instead of {prefetch}: each batch takes "
                f"{size / 2**20:,.1f} MB, and Ray's object store has room for "
                f"{self._room / 2**20:,.0f} MB"
            )
        return min(fits, prefetch)

    def close(self) -> None:
        """Kill the actors; may be called twice."""
        if ray.is_initialized():  # after Ray's shutdown the actors are gone anyway
            for reader in self._readers:
                ray.kill(reader.actor)
        self._readers, self._parked = [], []

    def fetch(self, answer: RayAnswer) -> Batch:
        """Wait for an answer, reassigning its request as often as necessary.

        Raises:
            UserError: a shard is missing or changed; readers keep dying.
            RayTaskError: a reader raised any other error, which is a bug.
        """
        with exit_code_kept():
            while True:
                while answer in self._parked:
                    self._assign([], wait=True)
                try:
                    return answer.batch(ray.get(answer.reference))
                except RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
                except LOST as error:
                    self._lost(answer, error)

    def forget(self, answer: RayAnswer) -> None:
        """Discard a request; a reader that has not started it skips it."""
        if answer in self._parked:
            self._parked.remove(answer)
        elif ray.is_initialized() and answer.reader is not None:
            ray.cancel(answer.reference)
        self._release(answer)

    def _release(self, answer: RayAnswer) -> None:
        if answer.reader is not None and answer in answer.reader.asked:
            answer.reader.asked.remove(answer)
        # Ray frees the result when the last reference is dropped.
        answer.reader = answer.reference = answer.buffer = None

    def _lost(self, answer: RayAnswer, error: Exception) -> None:
        """Reassign a dead reader's unanswered requests and blame the one that it was reading."""
        reader = answer.reader
        assert reader is not None
        unanswered = reader.unanswered()
        if answer not in unanswered:  # the result is lost, not the reader
            unanswered.insert(0, answer)
        # A reader reads requests in order, so it died on its first unanswered request or before it:
        # the others are never to blame, however often this happens.
        unanswered[0].deaths += 1
        reader.mark_dead()
        for one in unanswered:
            self._release(one)
        if unanswered[0].deaths >= MOST_DEATHS:  # don't reassign it: it would kill the next reader
            self._assign(unanswered[1:])
            raise _too_many_deaths(unanswered[0].request, error) from error
        self._assign(unanswered)

    def _assign(self, answers: list[RayAnswer], wait: bool = False) -> None:
        """Send requests to living readers, parked ones included; if none is alive, park or wait for one."""
        # Earliest first: it is what the consumer waits for.
        self._parked = sorted(self._parked + answers, key=lambda answer: answer.number)
        down = [reader for reader in self._readers if reader.greeting is not None]
        if down:
            self._rejoin(down, wait=wait and len(down) == len(self._readers))
        if all(reader.greeting is not None for reader in self._readers):
            return
        for answer in self._parked:
            reader = next(r for r in self._turn if r.greeting is None)
            reader.ask(answer)
        self._parked = []

    def _rejoin(self, down: list[_Reader], wait: bool) -> None:
        """Check which dead readers have restarted, and wait for one if requested."""
        greetings = [reader.greeting for reader in down]
        back, _ = ray.wait(greetings, timeout=RESTART_SECONDS if wait else 0)
        for reader in down:
            if reader.greeting in back:
                reader.rejoin()
        if wait and not back:
            raise UserError(
                f"no reader restarted within {RESTART_SECONDS:.0f} s after the last one died",
                where="stream.backend=ray",
                remedy="check the readers' logs; they usually ran out of memory: use fewer "
                "stream.workers",
            )


class RayAnswer:
    """A request in flight, or parked."""

    def __init__(self, readers: RayReaders, request: Request, layout: Layout, number: int) -> None:
        self.request, self.layout, self.number = request, layout, number
        self.reader: _Reader | None = None
        self.reference: Any = None
        self.buffer: Buffer | None = None
        """Memory lent for its pixels."""
        self.deaths = 0
        self._readers = readers

    def wait(self) -> Batch:
        """Wait for the batch and return it."""
        batch = self._readers.fetch(self)
        self._readers._release(self)
        return batch

    def batch(self, result: tuple[Any, ...]) -> Batch:
        """Make a batch of the reader's result."""
        reader, buffer = self.reader, self.buffer
        assert reader is not None
        if result[0] is not None or buffer is None:
            if buffer is not None:
                reader.lends = False  # it is on another host: lent memory would only be wasted
            return batch_of(result)
        lease = reader.lender.spares.lease(buffer)
        return batch_of(result, self.layout.images(np.asarray(lease)))

    def drop(self) -> None:
        """Discard the request."""
        self._readers.forget(self)


class _Reader:
    """One actor, alive or restarting, and its pending requests in order."""

    def __init__(self, spec: ReaderSpec, name: str, resources: Mapping[str, float]) -> None:
        self._spec, self._name, self._resources = spec, name, dict(resources)
        self.asked: list[RayAnswer] = []
        self.lender, self.lends = Lender(), True
        self.greeting: Any = None
        """While the actor is down: a call that Ray retries until it has restarted."""
        self._stillborn = 0
        self.actor = self._start()

    def _start(self) -> Any:
        where: Any = "SPREAD"
        if not self._resources:
            here = ray.get_runtime_context().get_node_id()
            where = NodeAffinitySchedulingStrategy(here, soft=False)
        actor: Any = ray.remote(ReaderActor)
        how = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0}
        # Ray frees a dead actor's name only after a while, so its successors get no name.
        named = {"name": self._name} if self._name else {}
        self._name = ""
        placed = {"resources": self._resources, "scheduling_strategy": where}
        return actor.options(**named, **placed, **how).remote(self._spec)

    def ask(self, answer: RayAnswer) -> None:
        request = answer.request
        answer.reader = self
        answer.buffer = self.lender.take(answer.layout.size) if self.lends else None
        loan = None if answer.buffer is None else self.lender.loan(answer.buffer)
        answer.reference = self.actor.read.remote(request.ids, request.view, loan)
        self.asked.append(answer)

    def unanswered(self) -> list[RayAnswer]:
        """Return the unanswered requests in order."""
        references = [answer.reference for answer in self.asked]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [a for a in self.asked if a.reference not in ready or _is_lost(a.reference)]

    def mark_dead(self) -> None:
        """Mark the reader as dead: it gets no requests until it has answered a greeting."""
        if self.greeting is None:
            self.greeting = self._greet()

    def _greet(self) -> Any:
        return self.actor.process_id.options(max_task_retries=-1).remote()

    def rejoin(self) -> None:
        """Handle the result of the greeting: the actor is back, or it is permanently gone and replaced.

        Raises:
            UserError: a reader can't be started here.
        """
        try:
            ray.get(self.greeting)
        except ActorDiedError as error:
            self._stillborn += 1
            if error.actor_init_failed or self._stillborn == MOST_DEATHS:
                raise UserError(
                    f"a reader can't be started: {last_line(error)}",
                    where="stream.backend=ray",
                    remedy="check the readers' logs, or set stream.backend=local",
                ) from error
            self.actor = self._start()
            self.greeting = self._greet()
        else:
            self._stillborn = 0
            self.greeting = None
            self.lends = True  # perhaps it has restarted on this host


def _check_resources(wanted: Mapping[str, float]) -> None:
    """Check that some node has these; Ray itself would wait for one forever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= n for name, n in wanted.items()) for node in nodes):
        raise UserError(
            f"no node of the cluster has {dict(wanted)} for a reader",
            where="cluster.reader_resources",
            remedy="start the nodes that should read with `ray start --resources='{\"…\": 16}'`, or "
            "leave the field empty: readers then run on their rank's node",
        )


def _is_lost(reference: Any) -> bool:
    try:
        ray.get(reference)
    except (*LOST, TaskCancelledError):
        return True
    except RayTaskError:  # counts as an answer: raised to the waiting caller
        return False
    return False


def _store_bytes() -> float:
    """Return the capacity of this node's object store in bytes."""
    me = ray.get_runtime_context().get_node_id()
    sizes = [n["Resources"].get("object_store_memory", 0) for n in ray.nodes() if n["NodeID"] == me]
    return float(sum(sizes))


def _too_many_deaths(request: Request, error: Exception) -> UserError:
    return UserError(
        f"a reader died {MOST_DEATHS} times on one request: {last_line(error)}",
        where=f"sample ids {request.ids[:4].tolist()}…, view {request.view}",
        remedy="check the readers' logs (in Ray's session folder; for a failed `cnn2gnn run` in "
        "the run's ray-logs); they usually ran out of memory: use fewer stream.workers or "
        "smaller batches",
    )
