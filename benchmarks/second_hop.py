"""``graph.sampling.second_hop``: the accuracy of ``cached`` against ``sampled`` on CIFAR-10, paired by seed.

    python benchmarks/second_hop.py FOLDER --limit 15000 --seeds 0 1 2      (about 15 minutes on 2 cores)

For each seed it trains one teacher and writes its soft targets; then it trains one student each way, from copies of
that run, with a shortened schedule. Prints accuracies on the 10,000 test images, their differences, and seconds of the
student stage. When it is run again, it continues with what is missing. Needs $CNN2GNN_DATA/cifar10.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cnn2gnn_dist import durable

WAYS = ("sampled", "cached")
SCHEDULE = ["teacher.epochs=6", "student.epochs=10", "graph.start_epoch=5", "graph.refresh_epochs=1",
            "graph.partition.parts=1", "run.ranks=1", "student.control=false"]  # fmt: skip


def cnn2gnn(command: str, folder: Path, options: list[str]) -> None:
    """Run one command of the CLI on the CIFAR-10 preset."""
    line = [sys.executable, "-m", "cnn2gnn_dist", command, "--config", "cifar10"]
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        subprocess.run([*line, f"run.dir={folder}", *options], stdout=log, stderr=log, check=True)


def one(root: Path, seed: int, limit: int) -> dict[str, Any]:
    """Run both variants for one seed."""
    options = [*SCHEDULE, f"seed={seed}", f"data.limit={limit}"]
    base = root / f"seed{seed}-base"
    for stage in ("pack", "index", "teacher", "targets"):
        cnn2gnn(stage, base, options)
    row: dict[str, Any] = {"seed": seed}
    for way in WAYS:
        folder = root / f"seed{seed}-{way}"
        if not folder.exists():
            shutil.copytree(base, folder)
        started = time.perf_counter()
        cnn2gnn("student", folder, [*options, f"graph.sampling.second_hop={way}"])
        row[f"{way}_seconds"] = time.perf_counter() - started
        cnn2gnn("run", folder, [*options, f"graph.sampling.second_hop={way}"])
        row[way] = json.loads((folder / "results.json").read_text())["student"]["accuracy"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=15_000, help="training images (50000: all)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    log = given.folder / "results.jsonl"
    rows = durable.read_lines(log) if log.exists() else []
    for seed in given.seeds:
        if seed not in [row["seed"] for row in rows]:
            rows.append(one(given.folder, seed, given.limit))
            durable.write_text(log, "".join(json.dumps(row) + "\n" for row in rows))
            print(rows[-1], flush=True)
    gaps = [100 * (row["cached"] - row["sampled"]) for row in rows]
    for way in WAYS:
        print(f"{way:8} {100 * mean(row[way] for row in rows):.2f} %, "
              f"{mean(row[way + '_seconds'] for row in rows):.0f} s")  # fmt: skip
    spread = stdev(gaps) if len(gaps) > 1 else float("nan")
    print(
        f"cached - sampled: {mean(gaps):+.2f} points, {spread:.2f} between seeds, n = {len(gaps)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
