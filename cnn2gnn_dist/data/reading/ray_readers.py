"""Reader actors: one of the two rooms in which Ray is met.

A reader actor holds nothing but caches. When it dies, Ray starts another, and all that it had
not answered is asked again, at once and of the readers that live. Exactly-once follows from
purity. The room also sees that what is in flight fits into Ray's object store, which would
otherwise spill to disk without a word.
"""

from __future__ import annotations

import itertools
import os
import sys
import uuid
from typing import Any

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

from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.data.reading.reader_actor import ReaderActor, batch_of
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ray_session import exit_code_kept

MOST_DEATHS = 10
"""Deaths of readers while they read one request, after which the request is to blame."""
BACK_SECONDS = 120.0
"""For a dead reader to come back; it takes about two."""
STORE_SHARE = 0.5
"""Of the object store for what all streams of a node have in flight; Ray spills from 0.8 on."""

LOST = (RayActorError, OutOfMemoryError, ObjectLostError)


class RayReaders:
    """Reader actors on this node, asked in turn.

    Args:
        spec: what they open.
        workers: how many.
        name: prefix of the actors' names.

    Raises:
        UserError: Ray does not run in this process; the spec can't be opened.
    """

    def __init__(self, spec: ReaderSpec, workers: int, name: str) -> None:
        if not ray.is_initialized():
            raise UserError(
                "Ray is not running in this process",
                where="stream.backend=ray",
                remedy="start through `cnn2gnn run`, or stream.backend=local",
            )
        Reader(spec).close()  # what can't be opened is said here, not by a dying actor
        self._row_bytes = 3 * spec.views.size**2 + 17  # image, label, id, valid
        self._room = _store_bytes() * STORE_SHARE / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._told = False
        tag = uuid.uuid4().hex[:6]
        names = (f"{name}-{number}-{tag}" for number in range(workers))
        self._readers = [_Reader(spec, one) for one in names]
        self._turn = itertools.cycle(self._readers)
        self._numbers = itertools.count()
        self._parked: list[RayAnswer] = []

    def ask(self, request: Request) -> RayAnswer:
        """Ask the next living reader; while none lives the request is parked."""
        answer = RayAnswer(self, request, next(self._numbers))
        self._assign([answer])
        return answer

    def depth(self, request: Request, prefetch: int) -> int:
        """How many requests like this may be in flight: ``prefetch``, or as many as have room.

        Raises:
            UserError: not even one.
        """
        size = len(request.ids) * self._row_bytes
        fits = int(self._room // size) if size else prefetch
        if fits < 1:
            raise UserError(
                f"one batch of {len(request.ids)} images takes {size / 2**20:,.0f} MB, and a "
                f"stream has {self._room / 2**20:,.0f} MB of Ray's object store",
                where="max_micro_batch, stream.backend=ray",
                remedy="smaller batches, stream.backend=local, or a larger object store "
                "(more shared memory: docker --shm-size)",
            )
        if fits < prefetch and not self._told:
            self._told = True
            print(
                f"stream: {fits} requests in flight instead of {prefetch}: batches of "
                f"{size / 2**20:,.1f} MB, and room for {self._room / 2**20:,.0f} MB "
                "in Ray's object store",
                file=sys.stderr,
                flush=True,
            )
        return min(fits, prefetch)

    def close(self) -> None:
        """End the actors; twice is no harm."""
        if ray.is_initialized():  # after its end the actors are gone anyway
            for reader in self._readers:
                ray.kill(reader.actor)
        self._readers, self._parked = [], []

    def fetch(self, answer: RayAnswer) -> Batch:
        """The answer, asked again as often as it takes.

        Raises:
            UserError: a shard is missing or changed; readers keep dying.
            RayTaskError: a reader raised something else, a bug.
        """
        with exit_code_kept():
            while True:
                while answer in self._parked:
                    self._assign([], wait=True)
                try:
                    return batch_of(ray.get(answer.reference))
                except RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
                except LOST as error:
                    self._lost(answer, error)

    def forget(self, answer: RayAnswer) -> None:
        """Nobody wants it any more: a reader that has not begun it need not."""
        if answer in self._parked:
            self._parked.remove(answer)
        elif ray.is_initialized() and answer.reader is not None:
            ray.cancel(answer.reference)
        self._let_go(answer)

    def _let_go(self, answer: RayAnswer) -> None:
        if answer.reader is not None and answer in answer.reader.asked:
            answer.reader.asked.remove(answer)
        answer.reader = answer.reference = None  # Ray frees the result with its last reference

    def _lost(self, answer: RayAnswer, error: Exception) -> None:
        """Ask again all that a dead reader owes; what it was reading bears the blame."""
        reader = answer.reader
        assert reader is not None
        owed = reader.owed()
        if answer not in owed:  # its result is lost, not its reader
            owed.insert(0, answer)
        # A reader reads in the order in which it was asked, so it died on the first it owes,
        # or before it: the others are innocent, however often it happens.
        owed[0].deaths += 1
        reader.revive()
        for one in owed:
            self._let_go(one)
        if owed[0].deaths >= MOST_DEATHS:  # never asked again, or it would kill the next reader
            self._assign(owed[1:])
            raise _hopeless(owed[0].request, error) from error
        self._assign(owed)

    def _assign(self, answers: list[RayAnswer], wait: bool = False) -> None:
        """Ask living readers, parked requests first; none lives: park, or wait for one."""
        # The consumer waits for the earliest: it comes first.
        self._parked = sorted(self._parked + answers, key=lambda answer: answer.number)
        down = [reader for reader in self._readers if reader.greeting is not None]
        if down:
            self._welcome(down, wait=wait and len(down) == len(self._readers))
        if all(reader.greeting is not None for reader in self._readers):
            return
        for answer in self._parked:
            reader = next(r for r in self._turn if r.greeting is None)
            reader.ask(answer)
        self._parked = []

    def _welcome(self, down: list[_Reader], wait: bool) -> None:
        """See which of the dead readers are back; wait for one if need be."""
        greetings = [reader.greeting for reader in down]
        back, _ = ray.wait(greetings, timeout=BACK_SECONDS if wait else 0)
        for reader in down:
            if reader.greeting in back:
                reader.welcome()
        if wait and not back:
            raise UserError(
                f"no reader has come back for {BACK_SECONDS:.0f} s after the last one died",
                where="stream.backend=ray",
                remedy="see the readers' logs; memory is the usual reason: fewer stream.workers",
            )


class RayAnswer:
    """A request in flight, or parked."""

    def __init__(self, readers: RayReaders, request: Request, number: int) -> None:
        self.request, self.number = request, number
        self.reader: _Reader | None = None
        self.reference: Any = None
        self.deaths = 0
        self._readers = readers

    def wait(self) -> Batch:
        """The batch, when it is there."""
        batch = self._readers.fetch(self)
        self._readers._let_go(self)
        return batch

    def drop(self) -> None:
        """Nobody wants it any more."""
        self._readers.forget(self)


class _Reader:
    """One actor, alive or on its way back, and what it was asked in order."""

    def __init__(self, spec: ReaderSpec, name: str) -> None:
        self._spec, self._name = spec, name
        self.asked: list[RayAnswer] = []
        self.greeting: Any = None
        """While it is down: a call that Ray repeats until the actor is back."""
        self._stillborn = 0
        self.actor = self._start()

    def _start(self) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(ReaderActor)
        how = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0}
        # Ray frees a dead actor's name only after a while: none for its successors.
        named = {"name": self._name} if self._name else {}
        self._name = ""
        return actor.options(**named, scheduling_strategy=here, **how).remote(self._spec)

    def ask(self, answer: RayAnswer) -> None:
        request = answer.request
        answer.reader = self
        answer.reference = self.actor.read.remote(request.ids, request.view)
        self.asked.append(answer)

    def owed(self) -> list[RayAnswer]:
        """What it was asked and has not answered, in order."""
        references = [answer.reference for answer in self.asked]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [a for a in self.asked if a.reference not in ready or _is_lost(a.reference)]

    def revive(self) -> None:
        """It died: don't ask it before it has answered a greeting."""
        if self.greeting is None:
            self.greeting = self._greet()

    def _greet(self) -> Any:
        return self.actor.process_id.options(max_task_retries=-1).remote()

    def welcome(self) -> None:
        """Its greeting was answered: it is back; or it never will be, and another is started.

        Raises:
            UserError: a reader can't be started here.
        """
        try:
            ray.get(self.greeting)
        except ActorDiedError as error:
            self._stillborn += 1
            if error.actor_init_failed or self._stillborn == MOST_DEATHS:
                raise UserError(
                    f"a reader can't be started: {_last_line(error)}",
                    where="stream.backend=ray",
                    remedy="see the readers' logs, or stream.backend=local",
                ) from error
            self.actor = self._start()
            self.greeting = self._greet()
        else:
            self._stillborn = 0
            self.greeting = None


def _is_lost(reference: Any) -> bool:
    try:
        ray.get(reference)
    except (*LOST, TaskCancelledError):
        return True
    except RayTaskError:  # an answer too: it is raised to who waits for it
        return False
    return False


def _store_bytes() -> float:
    """Capacity of this node's object store."""
    me = ray.get_runtime_context().get_node_id()
    sizes = [n["Resources"].get("object_store_memory", 0) for n in ray.nodes() if n["NodeID"] == me]
    return float(sum(sizes))


def _hopeless(request: Request, error: Exception) -> UserError:
    return UserError(
        f"a reader died {MOST_DEATHS} times on one request: {_last_line(error)}",
        where=f"sample ids {request.ids[:4].tolist()}…, view {request.view}",
        remedy="see the readers' logs (in Ray's session folder; of a failed `cnn2gnn run` in the "
        "run's ray-logs); memory is the usual reason: fewer stream.workers, smaller batches",
    )


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
