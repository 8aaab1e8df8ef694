"""Steps of a two-layer GNN at fan-out [10, 10] on two ranks that own their partitions: ours, DGL, PyG.

    python benchmarks/steps.py FOLDER --nodes 1281167 --homophily 0.65     (about 8 minutes)
    python benchmarks/steps.py FOLDER ... --precision bfloat16             all of them under autocast

FOLDER is that of ``benchmarks/scale.py``, whose graph and METIS partitions are used. Steps are timed end to end:
sampling, gathering features, forward, backward, gradients averaged by DDP over gloo, AdamW. There are no images: a
seed's own features are those of the bank with a little noise. DGL and PyG hold all features in each process; ours
holds a partition with its halos. Every contender runs in separate processes, in turns over the rounds.
PyG's NeighborLoader needs pyg-lib (not on PyPI) or torch-sparse (built from its source: see
benchmarks/requirements.txt).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import embeddings
import numpy as np
import torch
import torch.distributed as dist
from rank_processes import run_ranks
from stepping.contenders import BATCH, Arrays, make
from tqdm import tqdm

NAMES = (
    "ours-table-sampled",
    "ours-table-cached",
    "ours-dgl-sampled",
    "ours-distdgl-sampled",
    "dgl",
    "pyg",
)
RIVALS = ("dgl", "pyg")
RANKS, WARM_UP = 2, 5


def load(folder: Path, nodes: int, homophily: float) -> Arrays:
    """The arrays of a set of nodes that scale.py has partitioned."""
    place = folder / f"n{nodes}-h{int(100 * homophily)}"
    embeddings.write(place / "features", nodes, homophily)

    def one(name: str) -> np.ndarray:
        return np.load(place / f"{name}.npy", mmap_mode="r")

    return Arrays(
        place, one("features/x"), one("z"), one("labels"), one("candidates"), one("part-metis-2")
    )


def rank_main(given: argparse.Namespace, arrays: Arrays) -> dict[str, float]:
    """Train; return this rank's figures."""
    torch.set_num_threads(1)
    steps = given.steps
    dist.init_process_group("gloo")
    contender = make(given.one, arrays, dist.get_rank())
    module = torch.nn.parallel.DistributedDataParallel(contender.module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    sums = {"feature_bytes": 0.0, "remote": 0.0, "loss": 0.0}
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            dist.barrier()
            started, worked = time.perf_counter(), time.process_time()
        step = next(contender.batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bfloat16"):
            loss = step.loss(module)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number >= WARM_UP:
            sums["feature_bytes"] += step.feature_bytes
            sums["remote"] += step.remote
        sums["loss"] = float(loss.detach())
    busy = time.process_time() - worked
    dist.barrier()
    seconds = time.perf_counter() - started
    return {
        "seeds_per_s": RANKS * steps * BATCH / seconds,
        "bytes_a_seed": sums["feature_bytes"] / steps / BATCH,
        "remote_share": sums["remote"] / steps,
        "halo_mib": contender.halo_bytes / 2**20,
        "waiting_share": max(0.0, 1 - busy / seconds),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": sums["loss"],
    }


def together(given: argparse.Namespace, name: str) -> dict[str, float]:
    """Run both ranks of one contender; return the mean of their figures."""
    options = [str(given.folder), "--nodes", str(given.nodes), "--homophily", str(given.homophily)]
    options += ["--steps", str(given.steps), "--precision", given.precision, "--one", name]
    figures = run_ranks(__file__, options, RANKS)
    if figures is None:
        return {}
    return {key: sum(f[key] for f in figures) / RANKS for key in figures[0]}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds, and seeds/s relative to the better of the two competitors."""
    middle: dict[str, dict[str, Any]] = {
        name: {key: median(r[key] for r in rounds) for key in rounds[0]}
        for name, rounds in found.items()
        if rounds
    }
    best = max((middle[name]["seeds_per_s"] for name in RIVALS if name in middle), default=0.0)
    head = ["", "seeds/s", "relative to the better rival", "feature bytes per seed", "remote", "halo per refresh, MiB",
            "waiting", "peak GiB per rank"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, f in middle.items():
        ratio = f"{f['seeds_per_s'] / best:.2f}" if best else ""
        lines.append(
            f"| {name} | {f['seeds_per_s']:,.0f} | {ratio} | {f['bytes_a_seed']:,.0f} | {f['remote_share']:.1%} "
            f"| {f['halo_mib']:,.0f} | {f['waiting_share']:.1%} | {f['peak_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=1_281_167)
    parser.add_argument("--homophily", type=float, default=0.65)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="per rank and round")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    arrays = load(given.folder, given.nodes, given.homophily)
    if given.one:
        print(json.dumps(rank_main(given, arrays)))
        return 0
    found: dict[str, list[dict[str, float]]] = {name: [] for name in given.only}
    turns = [name for _ in range(given.rounds) for name in given.only]
    for name in (bar := tqdm(turns, unit="turn")):
        bar.set_description(name)
        if figures := together(given, name):
            found[name].append(figures)
    (given.folder / "steps.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
