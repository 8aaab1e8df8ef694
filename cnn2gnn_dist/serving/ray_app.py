"""The app on a Ray cluster: a Ray Serve deployment, and what ``serve run`` and KubeRay build.

    serve run cnn2gnn_dist.serving.ray_app:build model=/shared/MODEL replicas=4

Each replica runs the same app as ``cnn2gnn serve`` and batches what reaches it. The model's folder is
on storage that all replicas see. Without ``memory_version`` in ``user_config`` every replica follows
the memory: an edit through one replica is answered by the others a second later. With a number,
all answer from that version, without edits, and another number is rolled out by ``reconfigure``: loaded
alongside, then swapped in, without losing a request. One that can't be loaded is logged as an error by the replicas
that answer already, which continue as before; a replica that starts with it fails.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.classifier import BATCH, load
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.serving.app import create_app
from cnn2gnn_dist.serving.batching import Answered, Batcher, Job
from cnn2gnn_dist.serving.limits import Limits
from cnn2gnn_dist.serving.live import LiveModel
from cnn2gnn_dist.serving.metrics import Metrics
from cnn2gnn_dist.serving.service import Service
from cnn2gnn_dist.serving.token import read_token

_log = logging.getLogger(__name__)

_apps: list[FastAPI] = []
"""The app of this process's replica. Ray pickles the class below with copies of the globals that it
names, so this one is looked up in the module."""


class Options(BaseModel):
    """Arguments of ``build``.

    Attributes:
        model: folder of a model, at the same path on all nodes.
        replicas: of the app.
        device: "auto" (CUDA where Ray gives a replica a GPU), "cpu", "cuda".
        memory_version: the one that all answer from; None: the current one, which can be edited.
        token_file: as of ``cnn2gnn serve``; or ``CNN2GNN_TOKEN`` in the replicas' environment.
        rate: requests per second from one address to a replica; 0 = unlimited.
        cpus, gpus: per replica.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    replicas: int = 1
    device: str = "auto"
    memory_version: int | None = None
    token_file: str | None = None
    rate: float = 0.0
    cpus: float = 1.0
    gpus: float = 0.0


def _app() -> FastAPI:
    from cnn2gnn_dist.serving import ray_app

    return ray_app._apps[-1]


def _images(jobs: list[Job]) -> int:
    return sum(len(job.images) for job in jobs)


@serve.deployment(max_ongoing_requests=Limits.requests)
@serve.ingress(_app)
class Replica:
    """A replica: a model, its app, its batches.

    Args:
        options: see ``Options``.

    Raises:
        UserError: not a model, damaged; a bad token.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from cnn2gnn_dist.serving import ray_app

        given = Options.model_validate(options)
        limits, metrics = Limits(rate=given.rate, burst=max(1, round(2 * given.rate))), Metrics()
        self._configured = False
        self.live = LiveModel(load(given.model, device=given.device), metrics.swapped)
        self.batcher = Batcher(lambda: self.live.current, limits.waiting, metrics.batch)
        metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.service = Service(
            self.live, self._ask, limits, metrics, read_token(given.token_file),
            lambda: self.batcher.alive, self.batcher.close,
        )  # fmt: skip
        ray_app._apps.append(create_app(self.service))

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Answer from ``memory_version``, or follow the memory if it is None (``user_config``).

        Raises:
            UserError: the replica starts, and there is no such version.
        """
        number, before = config.get("memory_version"), self.live.pinned
        self.live.pinned = number is not None
        try:
            await asyncio.to_thread(
                self.live.follow if number is None else lambda: self.live.use(number)
            )
        except Exception as error:
            why = error.what if isinstance(error, UserError) else repr(error)
            if number is None:  # ``Service`` tries again every second
                _log.warning("the memory on disk can't be loaded: %s", why)
            elif self._configured:  # if raised, Serve would stop a replica that answers
                self.live.pinned = before
                _log.error(
                    "version %s of the memory can't be loaded, still answering from version %s: %s",
                    number, self.live.version, why,
                )  # fmt: skip
            else:
                raise
        self._configured = True

    async def _ask(self, images: list[Pixels], top: int, neighbours: int) -> Answered:
        job = Job(images, top, neighbours)
        try:
            made: Answered | BaseException = await self.answer(job)
        except asyncio.CancelledError:
            job.future.cancel()  # nobody waits any more
            raise
        if isinstance(made, BaseException):
            raise made
        return made

    @serve.batch(
        max_batch_size=BATCH, batch_wait_timeout_s=0.0, batch_size_fn=_images,
        max_concurrent_batches=Limits.requests,
    )  # fmt: skip
    async def answer(self, jobs: list[Job]) -> list[Answered | BaseException]:
        """Answer requests that Serve has put together.

        Serve closes a batch when it is taken, not when the network is free: under load each request would be one of its
        own. So all of them go on to the replica's ``Batcher``, which takes whatever waits.

        If a request can't be answered, its error is returned in its place: if raised, it would fail the whole batch.
        """
        return await asyncio.gather(*map(self._queued, jobs), return_exceptions=True)

    async def _queued(self, job: Job) -> Answered:
        self.batcher.put(job)
        return await asyncio.wrap_future(job.future)


def build(options: Options | dict[str, Any]) -> serve.Application:
    """Return the application of a model; Serve calls it with the ``args`` of a config as a dict.

    ``serve deploy`` with a changed ``user_config`` reconfigures the replicas; ``serve.run`` replaces them
    one by one, which takes longer.
    """
    given = Options.model_validate(options)
    return Replica.options(  # type: ignore[attr-defined, no-any-return]
        num_replicas=given.replicas,
        user_config={"memory_version": given.memory_version},
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus},
    ).bind(given.model_dump(exclude={"memory_version"}))
