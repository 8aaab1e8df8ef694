"""Seconds that a training step takes here: timed on as many processes as there will be ranks."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from cnn2gnn_dist import settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.block import Block, averaged_block
from cnn2gnn_dist.models.cost import count_flops
from cnn2gnn_dist.models.precision import MixedPrecision
from cnn2gnn_dist.models.student import Student
from cnn2gnn_dist.runtime.hosts import allotted
from cnn2gnn_dist.stages.shared.networks import Teacher, build_student
from cnn2gnn_dist.training.precision import choose

ENOUGH_S, STEPS = 0.6, 3
"""Least seconds and steps for which a model is timed, after one uncounted step."""
_BANK = 4096  # rows of the bank from which the timed blocks are made
_RAY_NICENESS = 15  # Ray gives its workers less priority than whoever started it
_barrier: Barrier | None = None
_idle = False


@dataclass(frozen=True)
class Machine:
    """The resources of the run.

    Attributes:
        ranks: training processes.
        cores: CPU cores of this process.
        device: "cpu" or "cuda".
        workers: reader threads or actors of each rank.
    """

    ranks: int
    cores: int
    device: str
    workers: int = 1


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step of all ranks, and of a forward pass of as many images.

    Attributes:
        teacher, student, control: a step; the student's with its graph.
        teacher_forward, student_forward: a forward pass.
        busy: factor by which other processes slow down this machine (1: not at all).
    """

    teacher: float
    student: float
    control: float
    teacher_forward: float
    student_forward: float
    busy: float = 1.0


def this_machine() -> Machine:
    """Every GPU is a rank; on CPUs each rank has one thread, so a rank for every core up to 8."""
    cores = allotted.cores()
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        return Machine(gpus, cores, "cuda", max(1, min(6, cores // gpus - 1)))
    ranks = max(1, min(8, cores if cores <= 4 else cores // 2))
    return Machine(ranks, cores, "cpu")


class Stopwatch:
    """Times models in processes that live as long as the stopwatch; use it in a ``with`` block.

    Args:
        machine: the resources of the run.
        idle: assume that the machine will do nothing else: on CPUs, measure processor time, not wall-clock time.
    """

    def __init__(self, machine: Machine, *, idle: bool = False) -> None:
        self.processes = machine.ranks if machine.device == "cpu" else 1
        self.ranks, self.device = machine.ranks, machine.device
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(
            self.processes, context, _begin, (context.Barrier(self.processes), self.device, idle)
        )

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def time(self, config: Config, num_classes: int, images: int) -> Speed | None:
        """Time the models of a config, each process with its share of the batch; None: they don't fit into the GPU.

        Raises:
            UserError: a process was killed.
        """
        tree = settings.as_tree(config)
        try:
            jobs = [
                self.pool.submit(_time, tree, num_classes, images, self.ranks)
                for _ in range(self.processes)
            ]
            found = [job.result() for job in jobs]
        except torch.OutOfMemoryError:
            return None
        except BrokenProcessPool:
            raise UserError(
                "a process that times the networks was killed, probably because the memory is full",
                where=f"{config.views.size} pixels, {config.teacher.arch}",
                remedy="end other processes that use memory, and run the same command again",
            ) from None
        return Speed(*(max(column) for column in zip(*found, strict=True)))


def teacher_flops(config: Config, num_classes: int) -> int:
    """Operations of a forward pass of the teacher for one image."""
    size = config.views.size
    return count_flops(
        Teacher(config, num_classes, initial=False),
        torch.zeros(1, size, size, 3, dtype=torch.uint8),
    )


def clock(idle: bool) -> Callable[[], float]:
    """The timer: wall-clock or processor time, in seconds."""
    return time.process_time if idle else time.perf_counter


def _begin(barrier: Barrier, device: str, idle: bool) -> None:
    global _barrier, _idle
    _barrier, _idle = barrier, idle and device == "cpu"
    if not idle:
        os.nice(_RAY_NICENESS)
    if device == "cpu":
        torch.set_num_threads(1)


def _time(tree: dict[str, Any], num_classes: int, images: int, ranks: int) -> tuple[float, ...]:
    config = settings.check(tree)
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    size, teacher, student = config.views.size, config.teacher, config.student
    torch.manual_seed(0)
    began = clock(_idle)(), time.process_time()

    def step_of(model: MixedPrecision, batch: int, around: bool = False) -> tuple[float, float]:
        model = model.to(device)
        model.compute_dtype = choose(config.precision, device, {})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
        labels = torch.randint(0, num_classes, (batch,), device=device)
        query = RandomQuery(config, num_classes, images, device) if around else None

        def logits() -> torch.Tensor:
            if isinstance(model, Student):
                result: torch.Tensor = model(pixels, query).logits_BC
                return result
            output: torch.Tensor = model(pixels)
            return output

        def step() -> None:
            loss = torch.nn.functional.cross_entropy(logits().float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def forward() -> None:
            with torch.no_grad():
                logits()

        return _seconds(step, device), _seconds(forward, device)

    def repeats(settings: Any) -> tuple[int, int]:
        """Images of a rank's micro-batch, and micro-batches of a step."""
        share = max(2, settings.global_batch // ranks)
        micro = min(share, settings.max_micro_batch)
        return micro, -(-share // micro)

    def busy() -> float:
        wall, cpu = clock(_idle)() - began[0], time.process_time() - began[1]
        return max(1.0, wall / max(cpu, 1e-3)) if device == "cpu" else 1.0

    batch, times = repeats(teacher)
    whole, forward = step_of(Teacher(config, num_classes, initial=False), batch)
    small, small_times = repeats(student)
    control, self_forward = step_of(build_student(config, num_classes, "none"), small)
    graph, _ = step_of(build_student(config, num_classes, "dataset"), small, True)
    return (
        whole * times,
        graph * small_times,
        control * small_times,
        forward * times,
        self_forward * small_times,
        busy(),
    )


def _seconds(step: Callable[[], None], device: str) -> float:
    """Mean seconds of a step, while the other processes time the same."""
    assert _barrier is not None
    step()
    _barrier.wait(timeout=600)
    now = clock(_idle)
    began, count, spent = now(), 0, 0.0
    while count < STEPS or spent < ENOUGH_S:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        count += 1
        spent = now() - began
        if spent > 4 * ENOUGH_S:
            break
    return spent / count


class RandomQuery:
    """Blocks around random seeds, searched and averaged like those of a graph."""

    def __init__(self, config: Config, num_classes: int, images: int, device: str) -> None:
        graph, width = config.graph, config.student.dim
        self.graph, self.nodes = graph, max(2, min(images, _BANK))
        self.bank_z = torch.nn.functional.normalize(torch.randn(images, graph.dim), dim=1)
        self.x_VD = torch.randn(self.nodes, width, device=device)
        self.z_Vd = self.bank_z[: self.nodes].to(device)
        self.labels_V = torch.randint(0, num_classes, (self.nodes,), device=device)
        self.device = device

    def block(self, z_Bd: torch.Tensor) -> Block:
        """The block around seeds with these projections."""
        first, second = self.graph.sampling.fanouts
        if self.graph.sampling.second_hop == "cached":
            second = 2  # the fewest: a cached average is one more row of the bank
        near_BF = (z_Bd.detach().float().cpu() @ self.bank_z.T).topk(min(first, self.nodes)).indices
        first_U, row = (near_BF % self.nodes).unique(return_inverse=True)
        return averaged_block(
            self.x_VD,
            self.z_Vd.to(z_Bd.dtype),
            self.labels_V,
            first_U=first_U.to(self.device),
            row_of_BF=row.view(near_BF.shape).to(self.device),
            second_UG=torch.randint(0, self.nodes, (len(first_U), second)).to(self.device),
            seed_B=torch.full((len(z_Bd),), -1, device=self.device),
            k=self.graph.neighbours,
        )
