"""What `cnn2gnn plan` predicts for a rank compared with real training steps: memory and speed.

    python benchmarks/sizing.py        CIFAR-10's teacher and student, 1 and 2 ranks, ZeRO 0 to 3 (4 minutes)

"states": all tensors of a rank after a step, when gradients are freed (except under ZeRO 3), and the plan's. On a CPU,
DeepSpeed's buckets (200 MB in ds_config.json) are tensors of which only the used part takes memory.
"peak": the largest size of the process (VmHWM), and the plan's process + states + activations. "process": the part
of the peak that is neither states nor activations (constants.PROCESS). "GFLOP/s": in the fastest step, per second of
processor time of the rank's single thread (constants.CPU_GFLOPS). Exit code 1 if a peak is more than 25 % off its
prediction.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rank_processes import ROOT, run_ranks

STEPS, TOLERANCE = 5, 0.25
CASES = (  # model, images of a rank's micro-batch, ranks, ZeRO stages
    ("teacher", 512, 1, (0, 2)),
    ("teacher", 256, 2, (0, 1, 2, 3)),
    ("student", 512, 1, (0,)),
    ("student", 512, 2, (0, 2)),
)


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def peak() -> int:
    """The largest size of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["VmHWM"].split()[0]) * 1024


def rank_main(kind: str, stage: int, micro: int) -> dict[str, float]:
    """Train some steps as one rank; return predictions and measurements."""
    from cnn2gnn_dist import settings
    from cnn2gnn_dist.commands.init.speed import RandomQuery
    from cnn2gnn_dist.commands.plan import estimate
    from cnn2gnn_dist.runtime.ranks import Ranks
    from cnn2gnn_dist.stages.shared.networks import Teacher, build_student
    from cnn2gnn_dist.training import ds_config, engine

    ranks = Ranks.from_environment()
    batch = micro * ranks.world_size
    fields = ("global_batch", batch), ("max_micro_batch", micro), ("zero_stage", stage)
    config = settings.load(
        "cifar10", ["precision=float32", *(f"{kind}.{field}={value}" for field, value in fields)]
    )
    own = config.teacher if kind == "teacher" else config.student
    classes, deepspeed = 10, ds_config.load(None)
    cluster = estimate.Cluster(1, ranks.world_size, False, None, None, 2)
    traces = estimate.trace_models(config, classes, 4096)
    plan = estimate.plan_model(kind, traces[kind], config, deepspeed, cluster, 50_000)
    expected = plan.memory[stage]

    engine.init(ranks, "cpu")
    gc.collect()
    before = live_bytes()
    torch.manual_seed(0)
    model: Any
    if kind == "teacher":
        model = Teacher(config, classes, initial=False)
    else:
        model = build_student(config, classes, "dataset")
    resolved = ds_config.resolve_for(
        deepspeed, own, ranks.world_size, plan.accumulation, "cpu", precision=config.precision
    )
    run = engine.Engine(model, resolved, device="cpu", average=own.average)
    size = config.views.size
    images = torch.randint(0, 256, (micro, size, size, 3), dtype=torch.uint8)
    labels = torch.randint(0, classes, (micro,))
    query = () if kind == "teacher" else (RandomQuery(config, classes, 4096, "cpu"),)
    seconds = timed_steps(run, images, labels, query)
    gc.collect()
    work = 3 * plan.trace.flops * micro
    return {
        "states": live_bytes() - before - images.nbytes,
        "predicted states": _without_gradients(expected) + plan.trace.buffers,
        "peak": peak(),
        "predicted": expected.total,
        "gflops": work / min(seconds) / 1e9,
    }


def timed_steps(run: Any, images: Any, labels: Any, query: tuple[Any, ...]) -> list[float]:
    """Train ``STEPS`` steps, with a ``query`` those of a student; return the processor seconds of each."""
    run.train()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    seconds = []
    for _ in range(STEPS):
        began = time.process_time()
        output = run(images, *query)
        if query:
            loss = F.cross_entropy(output.logits_BC, labels)
            loss = loss + F.cross_entropy(output.self_logits_BC, labels)
        else:
            loss = F.cross_entropy(output, labels)
        run.backward(loss)
        del loss, output
        run.step(1e-4)
        seconds.append(time.process_time() - began)
    return seconds


def _without_gradients(expected: Any) -> float:
    gone = expected.states.gradients if expected.stage < 3 else 0.0  # stage 3 keeps their memory
    return expected.states.total - gone


def measured(kind: str, stage: int, micro: int, world: int) -> dict[str, float]:
    """Start the ranks; return what rank 0 reports."""
    figures = run_ranks(__file__, ["--rank", kind, str(stage), str(micro)], world, ROOT)
    if figures is None:
        raise SystemExit(f"{kind}, ZeRO {stage}, {world} ranks: a rank failed")
    found: dict[str, float] = figures[0]
    return found


def main() -> int:
    """Measure all cases, and print the table."""
    from cnn2gnn_dist.commands.plan.constants import PROCESS

    print("| model | ranks | ZeRO | images | states, MB | predicted | peak, MB | predicted | ratio "
          "| process, MB | GFLOP/s |\n|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    far = False
    for kind, micro, world, stages in CASES:
        for stage in stages:
            found = {n: v / 1e6 for n, v in measured(kind, stage, micro, world).items()}
            predicted = PROCESS / 1e6 + found["predicted"]
            ratio = predicted / found["peak"]
            far = far or abs(ratio - 1) > TOLERANCE
            numbers = [
                found["states"], found["predicted states"], found["peak"], predicted, ratio,
                found["peak"] - found["predicted"], 1e6 * found["gflops"],
            ]  # fmt: skip
            cells = [f"{n:.2f}" if n < 10 else f"{n:,.0f}" for n in numbers]
            print(f"| {kind} | {world} | {stage} | {micro} | {' | '.join(cells)} |", flush=True)
    return 1 if far else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        print(json.dumps(rank_main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        sys.path.insert(0, str(ROOT))
        sys.exit(main())
