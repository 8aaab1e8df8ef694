"""A training step as the product runs it, compared with the loop that users would write in plain torch.

    python benchmarks/training.py                                   CIFAR-10's teacher and student (about 6 minutes)
    python benchmarks/training.py --preset mini_imagenet --models teacher --images 32

It trains the networks of a preset on random images. ``plain``: DistributedDataParallel over gloo, float32, images in
torch's layout (NCHW), BatchNorm separate on each rank. ``plain, bfloat16``: the same with channels_last and autocast.
``engine``: the network in the product's precision under DeepSpeed, at the ZeRO stage of ds_config.json. The student
gets random blocks of neighbors; under the engine its BatchNorm is synchronized across ranks, as in a run.

Every contender runs in separate processes, in turns over the rounds, with one thread per rank. Images per second are
those of all ranks by the clock; images per processor second are those of one rank by its own processor time, which
other work on the machine disturbs less. Ratios are of the latter. The last table shows where the engine's time goes
(torch's profiler, rank 0).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_processes import ROOT, run_ranks
from torch import Tensor, nn
from tqdm import tqdm

WAYS = ("plain", "plain, bfloat16", "engine")
WARM_UP = 3
KINDS = (  # the first pattern that an operator's name matches
    ("convolutions", r"conv"),
    ("norms", r"norm"),
    ("pooling", r"pool|amax"),
    ("matrix products", r"mm$|addmm|linear|bmm|matmul"),
    ("between ranks", r"gloo|all_?reduce|all_?gather|reduce_?scatter|broadcast|record_param_comms|c10d"),
    ("gathering neighbors", r"index|gather|scatter|embedding"),
    ("sorting", r"sort|topk|kthvalue|median"),
    ("copies and casts", r"copy|::to$|cat$|contiguous|clone|fill|zero"),
)  # fmt: skip


class _NCHW(nn.Module):
    """Gives a network its images in torch's default memory layout."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.network(images.contiguous())
        return made


def build(given: argparse.Namespace, kind: str) -> tuple[Any, Any, Callable[[Any, Tensor], Tensor]]:
    """The config, a network on the CPU, and the loss of its output."""
    from cnn2gnn_dist import settings
    from cnn2gnn_dist.stages.shared.networks import Teacher, build_student

    config = settings.load(given.preset, given.set)
    torch.manual_seed(0)
    if kind == "teacher":
        return config, Teacher(config, given.classes, initial=False), F.cross_entropy

    def both(output: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.logits_BC, labels) + F.cross_entropy(
            output.self_logits_BC, labels
        )

    return config, build_student(config, given.classes, "dataset"), both


def plain_step(given: argparse.Namespace, kind: str, low: bool) -> Callable[[], None]:
    """A step of the loop that users write; ``low``: with autocast to bfloat16 and channels_last."""
    config, model, loss_of = build(given, kind)
    own = config.teacher if kind == "teacher" else config.student
    if low:
        model.compute_dtype = torch.bfloat16
        model.to(memory_format=torch.channels_last)
    elif kind == "teacher":
        model.cnn = _NCHW(model.cnn)
    else:
        model.stem = _NCHW(model.stem)
    images, labels, query = batch(given, config, kind)
    made = nn.parallel.DistributedDataParallel(model)
    if own.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(
            model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(made(images, *query), labels).backward()
        optimizer.step()

    return step


def engine_step(given: argparse.Namespace, kind: str) -> Callable[[], None]:
    """A step as the product's stages take it."""
    from cnn2gnn_dist.runtime.ranks import Ranks
    from cnn2gnn_dist.training import ds_config
    from cnn2gnn_dist.training.engine import Engine
    from cnn2gnn_dist.training.precision import choose
    from cnn2gnn_dist.training.sync_norm import synchronise_norms

    config, model, loss_of = build(given, kind)
    world = Ranks.from_environment().world_size
    own = config.teacher if kind == "teacher" else config.student
    own = own.model_copy(
        update={"global_batch": given.images * world, "max_micro_batch": given.images}
    )
    deepspeed = ds_config.load(None)
    model.compute_dtype = choose(config.precision, "cpu", deepspeed)
    if kind == "student" and world > 1:
        synchronise_norms(model)
    resolved = ds_config.resolve_for(deepspeed, own, world, 1, "cpu", precision=config.precision)
    run = Engine(model, resolved, device="cpu", average=own.average)
    run.train()
    images, labels, query = batch(given, config, kind)

    def step() -> None:
        run.backward(loss_of(run(images, *query), labels))
        run.step_ahead(1e-4)

    return step


def batch(
    given: argparse.Namespace, config: Any, kind: str
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Images uint8 [B, S, S, 3], labels, and the neighbors around them, if the model takes any."""
    from cnn2gnn_dist.commands.init.speed import RandomQuery

    size = config.views.size
    images = torch.randint(0, 256, (given.images, size, size, 3), dtype=torch.uint8)
    labels = torch.randint(0, given.classes, (given.images,))
    query = (RandomQuery(config, given.classes, 4096, "cpu"),) if kind == "student" else ()
    return images, labels, query


def rank_main(given: argparse.Namespace) -> dict[str, Any]:
    """Train as one rank; return its figures."""
    from cnn2gnn_dist.runtime.ranks import Ranks
    from cnn2gnn_dist.training import engine

    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    kind, way = given.one
    if way == "engine":
        engine.init(ranks, "cpu")
        step = engine_step(given, kind)
    else:
        dist.init_process_group("gloo")
        step = plain_step(given, kind, low=way != "plain")
    for _ in range(WARM_UP):
        step()
    dist.barrier()
    walls, works = [], []
    for _ in range(given.steps):
        wall, work = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        works.append(time.process_time() - work)
    found: dict[str, Any] = {
        "images_per_s": ranks.world_size * given.images / median(walls),
        "images_per_cpu_s": given.images / median(works),
    }
    if way == "engine":
        found["shares"] = profile(step, ranks.rank)
    dist.barrier()
    return found


def profile(step: Callable[[], None], rank: int) -> dict[str, float]:
    """Shares of a step's time by kind of operator; all ranks take the steps, rank 0 is profiled."""
    watch: Any = contextlib.nullcontext()
    if rank == 0:
        watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with watch:
        began = time.perf_counter()
        for _ in range(2):
            step()
        whole = (time.perf_counter() - began) * 1e6
    if rank:
        return {}
    sums = {name: 0.0 for name, _ in KINDS} | {"other operators": 0.0}
    for event in watch.key_averages():
        fitting = (name for name, pattern in KINDS if re.search(pattern, event.key, re.IGNORECASE))
        sums[next(fitting, "other operators")] += event.self_cpu_time_total
    return {name: value / whole for name, value in sums.items()}


def together(given: argparse.Namespace, kind: str, way: str, world: int) -> dict[str, Any]:
    """Run all ranks of a contender; return the mean of their rates, and rank 0's profile."""
    options = [f"--preset={given.preset}", f"--images={given.images}", f"--steps={given.steps}"]
    options += [f"--classes={given.classes}", *(f"--set={one}" for one in given.set)]
    with tempfile.TemporaryDirectory() as folder:
        figures = run_ranks(__file__, [*options, "--one", kind, way], world, folder)
    if figures is None:
        raise SystemExit(f"{kind}, {way}, {world} ranks: a rank failed")
    found = {
        name: sum(f[name] for f in figures) / world for name in ("images_per_s", "images_per_cpu_s")
    }
    return found | {"shares": figures[0].get("shares", {})}


def tables(found: dict[tuple[str, str, int], list[dict[str, Any]]], models: list[str]) -> str:
    """Medians over the rounds; ratios to the plain loop; efficiency; the engine's profile."""

    def middle(key: tuple[str, str, int], name: str) -> float:
        return median(one[name] for one in found[key])

    lines = ["| model | loop | ranks | images/s | images per processor second | relative to plain | from 1 rank |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for kind, way, world in found:
        wall, work = (
            middle((kind, way, world), name) for name in ("images_per_s", "images_per_cpu_s")
        )
        ratio = work / middle((kind, "plain", world), "images_per_cpu_s")
        one = (kind, way, 1)
        scaled = (
            f"{wall / world / middle(one, 'images_per_s'):.2f}"
            if world > 1 and one in found
            else ""
        )
        lines.append(
            f"| {kind} | {way} | {world} | {wall:,.0f} | {work:,.0f} | {ratio:.2f} | {scaled} |"
        )
    worlds = sorted({world for _, _, world in found})
    columns = [(kind, world) for kind in models for world in worlds]
    heads = [f"{kind}, {world} rank{'s' * (world > 1)}" for kind, world in columns]
    lines += [
        "",
        "| the engine's step | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name in [name for name, _ in KINDS] + ["other operators"]:
        shares = [
            median(one["shares"][name] for one in found[kind, "engine", w]) for kind, w in columns
        ]
        lines.append(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the contenders in turns, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument(
        "--models", nargs="+", choices=("teacher", "student"), default=["teacher", "student"]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--images", type=int, default=256, help="per rank and step")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=10, help="per round, after three that are not counted"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(rank_main(given)))
        return 0
    turns = [(kind, way, world) for kind in given.models for way in WAYS for world in given.ranks]
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {turn: [] for turn in turns}
    for turn in (bar := tqdm(turns * given.rounds, unit="turn")):
        bar.set_description(", ".join(map(str, turn)))
        found[turn].append(together(given, *turn))
    print(tables(found, given.models))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
