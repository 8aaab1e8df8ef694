"""Checkpoint saves on a small file system that fills up, becomes read-only, and has space again.

Run in a separate mount namespace, as root: python tests/support/full_disk.py FOLDER; prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.training import engine
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from tests.support import tiny


def main(folder: Path) -> None:
    def mount(how: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "none", str(folder)], check=True)

    mount("size=96k")
    engine.init(Ranks(), "cpu")
    training, saved = tiny.build(0), Checkpoints(folder, "run", keep_last=100)
    found = []

    def save(step: int) -> None:
        tiny.train(training, range(step - 1, step))
        saved.save(step, training, {})
        saved.settle()
        newest = saved.latest()
        found.append([step, saved.problem, newest and newest.name])

    while saved.problem is None and len(found) < 50:
        save(len(found) + 1)
    mount("remount,ro")
    save(len(found) + 1)
    mount("remount,rw,size=10m")
    save(len(found) + 1)
    print(json.dumps(found))
    engine.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
