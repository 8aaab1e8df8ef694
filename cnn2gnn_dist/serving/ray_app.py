"""The app on a Ray cluster: a Ray Serve deployment, and what ``serve run`` and KubeRay build.

    serve run cnn2gnn_dist.serving.ray_app:build model=/shared/MODEL replicas=4

Each replica runs the same app as ``cnn2gnn serve`` and batches what reaches it. The model's folder is
on storage that all replicas see. Without ``memory_version`` in ``user_config`` every replica follows
the memory: an edit through one replica is answered by the others a second later. With a number,
all answer from that version, without edits, and another number is rolled out by ``reconfigure``: loaded
alongside, then swapped in, without losing a request.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.classifier import BATCH, load
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.serving.app import create_app
from cnn2gnn_dist.serving.batching import Answered, Job, answer_each
from cnn2gnn_dist.serving.limits import Limits
from cnn2gnn_dist.serving.live import LiveModel
from cnn2gnn_dist.serving.metrics import Metrics
from cnn2gnn_dist.serving.service import Service
from cnn2gnn_dist.serving.token import read_token

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
        self._network = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._metrics = metrics
        self.live = LiveModel(load(given.model, device=given.device), metrics.swapped)
        self.service = Service(
            self.live, self._ask, limits, metrics, read_token(given.token_file),
            closing=self._network.shutdown,
        )  # fmt: skip
        ray_app._apps.append(create_app(self.service))

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Answer from ``memory_version``, or follow the memory if it is None (``user_config``)."""
        number = config.get("memory_version")
        self.live.pinned = number is not None
        try:
            await asyncio.to_thread(
                self.live.follow if number is None else lambda: self.live.use(number)
            )
        except UserError:
            if number is not None:
                raise  # Ray reports it; the previous version stays in use

    async def _ask(self, images: list[Pixels], top: int, neighbours: int) -> Answered:
        made: Answered | BaseException = await self.answer(Job(images, top, neighbours))
        if isinstance(made, BaseException):
            raise made
        return made

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0, batch_size_fn=_images)
    async def answer(self, jobs: list[Job]) -> list[Answered | BaseException]:
        """Answer requests together; what arrives meanwhile forms the next batch.

        If a request can't be answered, its error is returned in its place: if raised, it would fail the whole batch.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._network, self._answered, jobs)

    def _answered(self, jobs: list[Job]) -> list[Answered | BaseException]:
        answer_each(lambda: self.live.current, jobs, self._metrics.batch)
        return [job.future.exception() or job.future.result() for job in jobs]


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
