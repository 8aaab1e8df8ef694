"""Build a graph version from a finished run: python tests/graph_builds.py RUN FOLDER DIE_AFTER.

DIE_AFTER: SIGKILL itself after so many units of the search; 0: end whole. Prints JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from cnn2gnn_dist import settings
from cnn2gnn_dist.graph import table_search
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages import candidates, graph
from cnn2gnn_dist.stages.context import Context, RunPaths

for name in ("SCAN_ROWS", "JOIN_ROWS", "PROBE_ROWS"):
    setattr(table_search, name, 40)


def main(run: Path, folder: Path, die_after: int) -> None:
    config = settings.load(
        str(run / "config.yaml"),
        ["graph.exact=false", "graph.query=table", "graph.recall=0.9", "evaluate.batch=16"],
    )
    context = Context(config, Ranks(), RunPaths(run), folder, "key", "cpu", False)
    embedded = units = 0
    generator = torch.Generator().manual_seed(0)
    lift = torch.randn(16 * 16 * 3, config.student.dim, generator=generator)

    def embed(images: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal embedded
        embedded += len(images)
        x = images.float().flatten(1) / 255 @ lift
        return x, torch.nn.functional.normalize(x[:, : config.graph.dim])

    def counted(bar: object, phase: str, done: int, total: int) -> None:
        nonlocal units
        units += 1
        if units == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    candidates._Bar.__call__ = counted  # type: ignore[method-assign]
    version = graph.build(context, embed, folder, 7, None, "weights of step 9")
    files = json.loads((version.path / "manifest.json").read_text())["files"]
    print(json.dumps({"embedded": embedded, "units": units, "files": files}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
