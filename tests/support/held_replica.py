"""A replica whose network waits until a file is there, so that requests wait for it for certain."""

from __future__ import annotations

import os
import time
from typing import Any

from ray import serve

from cnn2gnn_dist.serving.limits import Limits
from cnn2gnn_dist.serving.ray_app import Replica


class HeldReplica(Replica.func_or_class):  # type: ignore[name-defined, misc]
    """See ``Replica``; the first image is answered while the model is opened.

    Args:
        options: see there.
        gate: the file.
    """

    async def __init__(self, options: dict[str, Any], gate: str) -> None:
        await super().__init__(options)
        inner = self.live.current.network

        def wait(*arguments: object) -> object:
            while not os.path.exists(gate):
                time.sleep(0.01)
            return inner(*arguments)

        self.live.current.network = wait


def build(model: str, gate: str) -> serve.Application:
    """The application of one such replica."""
    made = serve.deployment(HeldReplica, max_ongoing_requests=Limits.requests)
    return made.bind({"model": model}, gate)
