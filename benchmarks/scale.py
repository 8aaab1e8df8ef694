"""How the graph scales: build, refresh, partition, sample, memory, from 50 thousand to 10 million nodes.

    python benchmarks/scale.py FOLDER                    the curves: 50 k, 200 k, 1.28 M (about 20 minutes)
    python benchmarks/scale.py FOLDER --nodes 10000000   another point (about 12 minutes, 10 GB of disk)
    python benchmarks/scale.py FOLDER --rivals           also faiss, hnswlib and pynndescent at 1.28 M
    python benchmarks/scale.py FOLDER --tables           existing results as Markdown; --pictures DOCS/images: plots

Each figure comes from a separate process and is kept in FOLDER/results.jsonl; when it is run again, it continues with
what is missing. Nodes: ``benchmarks/embeddings.py``, seed 0. Rivals: benchmarks/requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import embeddings
from scaling import measures, rivals
from scaling.tables import pictures, tables
from tqdm import tqdm

SIZES = (50_000, 200_000, 1_281_167)
FULL = 1_281_167
METIS_MOST = 2_000_000
NAMES = ("faiss IVF", "faiss HNSW", "hnswlib", "pynndescent")
MEASURES: dict[str, Any] = {
    "build": measures.build,
    "refresh": measures.refresh,
    "parts": measures.parts,
    "keep": measures.keep,
    "sample": measures.sample,
    "rival": rivals.rival,
}


def plan(nodes: int, homophily: float, with_rivals: bool) -> list[dict[str, Any]]:
    """The measurements for one set of nodes, in order."""
    steps: list[tuple[str, dict[str, Any]]] = [("build", {})]
    if with_rivals:
        steps += [("rival", {"name": name}) for name in NAMES]
        return [_job(nodes, homophily, name, options) for name, options in steps]
    ways = ["metis"] if nodes <= METIS_MOST else []
    for count in (2, 4, 8) if ways else (8,):
        steps += [("parts", {"how": how, "count": count}) for how in [*ways, "streaming"]]
    if nodes <= METIS_MOST:
        steps.append(("refresh", {}))
    if nodes == FULL:
        steps += [
            ("parts", {"how": how, "count": 8}) for how in ("contiguous", "random", "pymetis")
        ]
        steps.append(("keep", {}))
    steps.append(
        ("sample", {"how": "metis", "count": 2} if ways else {"how": "streaming", "count": 8})
    )
    return [_job(nodes, homophily, name, options) for name, options in steps]


def _job(nodes: int, homophily: float, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"nodes": nodes, "homophily": homophily, "measure": name, "options": options}


def one(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Measure, in this process."""
    options = dict(job["options"])
    if job["measure"] == "rival":
        options["goal"] = job["goal"]
    return MEASURES[job["measure"]](place(folder, job), **options)


def place(folder: Path, job: dict[str, Any]) -> Path:
    """The folder of a set of nodes."""
    return folder / f"n{job['nodes']}-h{int(100 * job['homophily'])}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--homophily", type=float, nargs="*", default=(0.65, 0.9))
    parser.add_argument(
        "--rivals", action="store_true", help="only the build, next to other libraries"
    )
    parser.add_argument(
        "--tables", action="store_true", help="print existing results, measure nothing"
    )
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="plot existing results")
    parser.add_argument("--dry-run", action="store_true", help="list what would be measured")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.folder, json.loads(given.one))))
        return 0
    log = given.folder / "results.jsonl"
    if not (given.tables or given.pictures):
        jobs = [
            job for n in given.nodes for h in given.homophily for job in plan(n, h, given.rivals)
        ]
        measure_all(given.folder, log, jobs, dry_run=given.dry_run)
    rows = read(log)
    if given.pictures:
        pictures(rows, given.pictures)
    print(tables(rows))
    return 0


def measure_all(folder: Path, log: Path, jobs: list[dict[str, Any]], *, dry_run: bool) -> None:
    """Make all measurements that have no row yet, one process after the other."""
    known = [row["job"] for row in read(log)]
    left = [job for job in jobs if job not in known]
    if dry_run:
        print("\n".join(json.dumps(job) for job in left))
        return
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(left, unit="figure")
    for job in bar:
        bar.set_description(
            f"{job['nodes']:,} {job['homophily']} {job['measure']} {job['options'] or ''}"
        )
        embeddings.write(place(folder, job), job["nodes"], job["homophily"], features=False)
        asked = dict(job)
        if job["measure"] == "rival":
            asked["goal"] = _our_recall(log, job)
        done = subprocess.run(
            [sys.executable, __file__, str(folder), "--one", json.dumps(asked)],
            env={**os.environ, "OMP_NUM_THREADS": "2" if job["measure"] == "rival" else "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        with open(log, "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"job": job, "found": json.loads(done.stdout.splitlines()[-1])}) + "\n"
            )


def read(log: Path) -> list[dict[str, Any]]:
    """All rows so far."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _our_recall(log: Path, job: dict[str, Any]) -> float:
    ours = {"nodes": job["nodes"], "homophily": job["homophily"], "measure": "build", "options": {}}
    return next(row["found"]["recall"] for row in read(log) if row["job"] == ours)


if __name__ == "__main__":
    sys.exit(main())
