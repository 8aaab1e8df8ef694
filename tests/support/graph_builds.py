"""Build a graph version from a finished run, in many small work units."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist import settings
from cnn2gnn_dist.graph.partition import parts
from cnn2gnn_dist.graph.search import approximate
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages import graph
from cnn2gnn_dist.stages.neighbours import candidates
from cnn2gnn_dist.stages.shared.context import Context, RunPaths


def contexts(run: Path, folder: Path, ranks: Ranks, batch: int = 16) -> Context:
    """The context of a build in many small work units."""
    for name in ("SCAN_ROWS", "JOIN_ROWS", "PROBE_ROWS"):
        setattr(approximate, name, 40)
    config = settings.load(
        str(run / "config.yaml"),
        [
            "graph.search.exact=false",
            "graph.sampling.query=table",
            "graph.search.recall=0.9",
            f"evaluate.batch={batch}",
        ],
    )
    return Context(config, ranks, RunPaths(run), folder, "key", "cpu", False)


def projection(context: Context) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Map images to x and z without a neural network."""
    config = context.config
    generator = torch.Generator().manual_seed(0)
    lift = torch.randn(16 * 16 * 3, config.student.dim, generator=generator)

    def embed(images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float().flatten(1) / 255 @ lift
        return x, torch.nn.functional.normalize(x[:, : config.graph.dim])

    return embed


def slow_second_rank(run: Path, folder: Path) -> dict[str, Any]:
    """Build on two ranks, one of which is much slower, with barriers that don't block.

    Returns the version's files, and the parts that this rank has cut.
    """
    ranks = Ranks.from_environment()
    context = contexts(run, folder, ranks)
    project = projection(context)
    collectives.barrier = lambda: None
    cut, cut_part = [], parts.build_part

    def noted(table: np.ndarray, part: np.ndarray, number: int) -> parts.PartGraph:
        cut.append(number)
        return cut_part(table, part, number)

    parts.build_part = noted

    def embed(images: Tensor) -> tuple[Tensor, Tensor]:
        begun = time.monotonic()
        while ranks.rank and time.monotonic() < begun + 0.1:
            project(images)
        return project(images)

    version = graph.build(context, embed, folder, 7, None, "weights of step 9")
    files = json.loads((version.path / "manifest.json").read_text())["files"]
    return {"files": files, "cut": cut}


def main(run: Path, folder: Path, die_after: int, batch: int = 16) -> None:
    """Build in a process that sends itself SIGKILL after ``die_after`` work units (0: never); print JSON."""
    context = contexts(run, folder, Ranks(), batch)
    embedded = units = 0
    project = projection(context)

    def embed(images: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal embedded
        embedded += len(images)
        return project(images)

    def counted(bar: object, phase: str, done: int, total: int) -> None:
        nonlocal units
        units += 1
        if units == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    candidates._Bar.__call__ = counted  # type: ignore[method-assign]
    version = graph.build(context, embed, folder, 7, None, "weights of step 9")
    files = json.loads((version.path / "manifest.json").read_text())["files"]
    print(json.dumps({"embedded": embedded, "units": units, "files": files}))
