"""Independent pieces of work on Ray actors: each is done once, even if actors die.

Unlike the ranks of a group (``group.py``), the actors are independent: Ray restarts one that dies, and the item in
which it was lost goes to the next actor that is free. Ray itself would repeat the call at once, and as often again
while the connections to a lost node are refused: until the cluster knows of the loss, some seconds later.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from cnn2gnn_dist.errors import UserError, last_line
from cnn2gnn_dist.runtime.ray import errors as ray_errors
from cnn2gnn_dist.runtime.ray import session as ray_session

ATTEMPTS = 3
"""How often actors may die of one item."""
START_SECONDS = 60.0
"""Seconds to wait for room for the first actor, and once no node is left on which one could be."""

Work = Callable[[Any], Any]


@ray.remote(max_restarts=-1, max_task_retries=0)
class _Worker:
    """Prepares once, then works through items."""

    def __init__(self, prepare: Callable[..., Work], arguments: dict[str, Any], cwd: str) -> None:
        self._prepare, self._arguments, self._cwd = prepare, arguments, cwd
        self._work: Work | None = None

    def ready(self) -> str:
        """Return the node's address, once there is room for this actor."""
        return str(ray.util.get_node_ip_address())

    def do(self, item: Any) -> Any:
        """Work on one item; an error that a user can fix is returned."""
        try:
            if self._work is None:
                self._enter()
                self._work = self._prepare(**self._arguments)
            return self._work(item)
        except UserError as error:
            return error

    def _enter(self) -> None:
        try:
            os.chdir(self._cwd)
        except OSError as error:
            raise UserError(
                f"the command's working directory is not on node {self.ready()} ({error.strerror})",
                where=self._cwd,
                remedy="run the command in a folder that every node sees at the same path",
            ) from None


@dataclass
class _Task:
    """An item, and how many actors have died of it."""

    item: Any
    deaths: int = 0


def work_off(
    items: Sequence[Any],
    prepare: Callable[..., Work],
    arguments: dict[str, Any],
    *,
    actors: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, result) for every item, in the order in which they finish.

    Ray must be running (:func:`.cluster.running`). An actor takes the next item when it is done with one, so
    that a slow node delays only its own items.

    Args:
        items: must be picklable.
        prepare: importable; called once in every actor, in this process's working directory; returns the
            function to apply to an item.
        arguments: of ``prepare``.
        actors: their largest number; as many work as the cluster has room for.
        cpus: per actor.
        gpus: per actor.

    Raises:
        UserError: raised by ``prepare`` or for an item; no room for a single actor, or none any more; an item
            whose actors keep dying.
    """
    remote = _Worker.options(num_cpus=cpus, num_gpus=gpus)  # type: ignore[attr-defined]
    count = max(1, min(actors, len(items)))
    workers = [remote.remote(prepare, arguments, os.getcwd()) for _ in range(count)]
    waiting = deque(map(_Task, items))
    starting = {_greet(worker): worker for worker in workers}
    running: dict[Any, tuple[Any, _Task]] = {}
    free: deque[Any] = deque()
    calls = _Calls(cpus, gpus)
    try:
        while waiting or running:
            done = calls.first_done([*running, *starting])
            if done is None:
                continue
            if (worker := starting.pop(done, None)) is None:
                worker, task = running.pop(done)
                try:
                    result = _result(done)
                except _ActorLost as error:
                    waiting.appendleft(_again(task, error))
                    # With its node, free actors may be lost as well: the item is not charged with those.
                    starting |= {_greet(one): one for one in (worker, *free)}
                    free.clear()
                else:
                    free.append(worker)
                    yield task.item, result
            else:
                free.append(worker)
            while waiting and free:
                worker, task = free.popleft(), waiting.popleft()
                running[worker.do.remote(task.item)] = (worker, task)
    finally:
        for worker in workers:
            ray.kill(worker)


class _Calls:
    """Waits for calls of actors that each need this much of a node."""

    def __init__(self, cpus: float, gpus: float) -> None:
        self._need = cpus, gpus
        self._deadline = time.monotonic() + START_SECONDS
        self._placed = self._lost = False

    def first_done(self, calls: list[Any]) -> Any | None:
        """The first call that is done; None if none was for a while, although there is a node for actors.

        Raises:
            UserError: no actor has found room, or no node is left that has any.
        """  # noqa: DOC501
        left = START_SECONDS if self._placed else max(0.0, self._deadline - time.monotonic())
        done, _ = ray.wait(calls, num_returns=1, timeout=left)
        if not done and (not self._placed or self._lost):
            raise _no_room(*self._need)
        self._lost = not done and not _has_a_node(*self._need)
        self._placed = self._placed or bool(done)
        return done[0] if done else None


def _greet(worker: Any) -> Any:
    """A call that Ray repeats until the actor, wherever it is restarted, has answered."""
    return worker.ready.options(max_task_retries=-1).remote()


class _ActorLost(Exception):
    """An actor died of an item, or its answer was lost."""


def _result(ref: Any) -> Any:
    try:
        with ray_session.exit_code_kept():
            found = ray.get(ref)
    except RayError as error:
        if cause := ray_errors.cause_of(error):
            raise cause from None
        raise _ActorLost(last_line(error)) from None
    if isinstance(found, UserError):
        raise found
    return found


def _again(task: _Task, error: _ActorLost) -> _Task:
    """The task, unless too many actors have died of it."""
    task.deaths += 1
    if task.deaths < ATTEMPTS:
        return task
    raise UserError(
        f"actors died {ATTEMPTS} times of {task.item}; last: {error}",
        where="--actors",
        remedy="see the log above; what was finished is kept, and the same command resumes",
    ) from None


def _has_a_node(cpus: float, gpus: float) -> bool:
    """Whether an actor could be on a node that is alive, if it had nothing else to do."""
    return any(
        node["Alive"]
        and node["Resources"].get("CPU", 0) >= cpus
        and node["Resources"].get("GPU", 0) >= gpus
        for node in ray.nodes()
    )


def _no_room(cpus: float, gpus: float) -> UserError:
    return UserError(
        f"the cluster has no room for an actor of {cpus:g} CPUs and {gpus:g} GPUs; it has "
        f"{ray.available_resources()}",
        where="--actors",
        remedy="use a larger cluster, or wait until other jobs are done",
    )
