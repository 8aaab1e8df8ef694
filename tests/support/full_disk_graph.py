"""Graph versions on a small file system that fills up at one step after another.

Run in a separate mount namespace, as root: python tests/support/full_disk_graph.py FOLDER; prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.partition import parts
from cnn2gnn_dist.graph.version import GraphWriter, latest_version, open_version
from tests.unit.graph import test_version


def main(folder: Path) -> None:
    how = ["-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    subprocess.run(["mount", *how], check=True)
    made = test_version.write(folder, 1)
    shapes = {name: (array.shape, array.dtype.type) for name, array in made.items()}
    part = parts.build_part(made["candidates"], made["part"], 0)
    found = []

    def when_full(name: str, step: Callable[[], object]) -> None:
        filler = folder / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass
        try:
            step()
        except UserError as error:
            newest = latest_version(folder)
            found.append([name, str(error), newest and newest.name])
            assert newest is not None
            open_version(newest).verify()
        filler.unlink()

    when_full("arrays", lambda: GraphWriter.create(folder, 2, shapes))
    writer = GraphWriter.create(folder, 2, shapes)
    when_full("a part", lambda: part.save(writer.path / "part-00"))
    part.save(writer.path / "part-00")
    when_full("the manifest", lambda: writer.finalise({"note": "x" * 9000}))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
