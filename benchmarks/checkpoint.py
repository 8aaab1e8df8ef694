"""What a checkpoint costs a training: step time, bytes, time to resume.

    PYTHONPATH=. torchrun --nproc_per_node 2 benchmarks/checkpoint.py --config cifar10 FOLDER
    PYTHONPATH=. torchrun --nproc_per_node 2 benchmarks/checkpoint.py --config cifar10 FOLDER   # resumes

It runs steps of the preset's teacher on random images, in blocks. Every second block begins with a save,
which costs as much as such a block takes longer than its neighbors. The second call loads what the first
one saved; both print the time from the start of the process to the end of the first step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from cnn2gnn_dist import settings
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.shared.networks import Teacher
from cnn2gnn_dist.training import ds_config, engine
from cnn2gnn_dist.training.accumulation import accumulation_for
from cnn2gnn_dist.training.checkpoint import folder as disk
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints

EVERY = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="cifar10")
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--steps", type=int, default=5, help="per block")
    args = parser.parse_args()
    ranks = Ranks.from_environment()
    engine.init(ranks, "cpu")
    training = Steps(args.config, ranks)
    saved = Checkpoints(args.folder, "benchmark")
    loaded = saved.load(training.engine)
    training.step()
    first = time.time() - psutil.Process().create_time()
    if ranks.is_first:
        print(f"{'resumed' if loaded else 'cold'}: first step after {first:.1f} s")
    if not loaded:
        measure(training, saved, args.blocks, args.steps)
    engine.shutdown()


def measure(training: Steps, saved: Checkpoints, blocks: int, steps: int) -> None:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    blocking, number = [], 0
    for block in range(blocks):
        saves = block % 2 == 1
        began = time.perf_counter()
        if saves:
            saved.save(number, training.engine, {})
            blocking.append(time.perf_counter() - began)
        for _ in range(steps):
            number += 1
            if training.step(float(saved.written)) == collectives.world_size():
                saved.settle()
        saved.settle()
        seconds[saves].append(time.perf_counter() - began)
    saved.save(number, training.engine, {})
    folder = saved.finish()
    if collectives.rank():
        return
    pairs = zip(seconds[True], seconds[False], seconds[False][1:], strict=False)
    cost = statistics.median(block - (a + b) / 2 for block, a, b in pairs)
    step = statistics.median(seconds[False]) / steps
    state = sum(t.nbytes for t in disk.read_tensors(folder).values())
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"step {step * 1e3:.0f} ms; a save costs {cost * 1e3:.0f} ms, of which "
          f"{statistics.median(blocking) * 1e3:.0f} ms at the step")  # fmt: skip
    print(f"every {EVERY} steps: {cost / (EVERY * step):.2%} of the step time")
    print(f"on disk {size / 1e6:.1f} MB for a state of {state / 1e6:.1f} MB: {size / state:.4f}")


class Steps:
    """The preset's teacher on one batch of random images."""

    def __init__(self, preset: str, ranks: Ranks) -> None:
        config = settings.load(preset)
        t, size = config.teacher, config.views.size
        torch.manual_seed(0)
        accumulation = accumulation_for(t.global_batch, ranks.world_size, t.max_micro_batch)
        resolved = ds_config.resolve(
            ds_config.load(t.ds_config),
            world_size=ranks.world_size,
            global_batch=t.global_batch,
            accumulation=accumulation,
            lr=t.lr,
            weight_decay=t.weight_decay,
            clip=t.clip,
            device="cpu",
            stage=t.zero_stage,
        )
        self.engine = engine.Engine(Teacher(config, 10), resolved, device="cpu")
        self.engine.train()
        self.accumulation, self.lr = accumulation, t.lr
        micro = t.global_batch // ranks.world_size // accumulation
        self.images = torch.randint(0, 256, (micro, size, size, 3), dtype=torch.uint8)
        self.labels = torch.randint(0, 10, (micro,))

    def step(self, vote: float = 0.0) -> Any:
        """Run one optimizer step; return the sum of the votes."""
        for _ in range(self.accumulation):
            logits = self.engine(self.images)
            self.engine.backward(torch.nn.functional.cross_entropy(logits, self.labels))
        return self.engine.step(self.lr, (vote,)).votes[0]


if __name__ == "__main__":
    main()
