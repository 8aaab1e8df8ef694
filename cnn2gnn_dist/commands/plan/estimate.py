"""The plan of a run: what every rank, host and disk holds, what the network carries, how long it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cnn2gnn_dist.commands.init.speed import RandomQuery
from cnn2gnn_dist.commands.plan import constants
from cnn2gnn_dist.commands.plan.activations import Trace, trace
from cnn2gnn_dist.commands.plan.states import States, ring_seconds, sent_in_a_step, states
from cnn2gnn_dist.config import Config, TrainConfig
from cnn2gnn_dist.graph import memory_model
from cnn2gnn_dist.pipeline.registry import stages_of
from cnn2gnn_dist.stages.shared.networks import Teacher, build_student
from cnn2gnn_dist.stages.shared.preflight import resolve_deepspeed
from cnn2gnn_dist.training.accumulation import accumulation_for
from cnn2gnn_dist.training.schedule import size_at

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Cluster:
    """The machines of the run.

    Attributes:
        nodes, ranks_per_node: R = nodes · ranks_per_node.
        on_gpu: each rank is a GPU, otherwise a core.
        flops: operations per second that a rank sustains in training the teacher; None: unknown.
        bytes_per_s: of a node's network; None: unknown.
        cores: of a node, for decoding.
    """

    nodes: int
    ranks_per_node: int
    on_gpu: bool
    flops: float | None
    bytes_per_s: float | None
    cores: int

    @property
    def ranks(self) -> int:
        """World size."""
        return self.nodes * self.ranks_per_node

    def rate(self, kind: str) -> float | None:
        """Operations per second of a rank with the teacher or the student."""
        share = 1.0 if kind == "teacher" else constants.STUDENT_SHARE
        return None if self.flops is None else share * self.flops


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank while it trains a model under one ZeRO stage."""

    stage: int
    states: States
    activations: float

    @property
    def total(self) -> float:
        """States and activations."""
        return self.states.total + self.activations


@dataclass(frozen=True)
class ModelPlan:
    """One of the two models.

    Attributes:
        kind: "teacher" or "student".
        trace: its trace.
        micro_batch, accumulation: images per rank at a time, and micro-batches per step.
        stage: ZeRO stage of this config.
        memory: of a rank, by ZeRO stage.
        sent: bytes per rank and step.
        steps: of the whole training.
        compute_s, network_s: seconds per step; None: unknown.
    """

    kind: str
    trace: Trace
    micro_batch: int
    accumulation: int
    stage: int
    memory: tuple[Memory, ...]
    sent: float
    steps: int
    compute_s: float | None
    network_s: float | None


def trainings(config: Config) -> list[str]:
    """The stages of a run with this config that train a model: teacher, student, control."""
    return [stage.name for stage in stages_of(config) if stage.trains]


def trace_models(config: Config, classes: int, images: int) -> dict[str, Trace]:
    """Trace a training step of the teacher, if there is one, and of the student with its graph."""
    size = config.views.size
    torch.manual_seed(0)
    scope = config.graph.scope
    student = build_student(config, classes, scope).train()
    query = RandomQuery(config, classes, images, "cpu") if scope == "dataset" else None

    def batch(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
        return pixels, torch.randint(0, classes, (count,))

    def of_student(count: int) -> Tensor:
        pixels, labels = batch(count)
        answer = student(pixels, query) if query is not None else student(pixels)
        loss = F.cross_entropy(answer.logits_BC, labels)
        return loss + F.cross_entropy(answer.self_logits_BC, labels)

    found = {"student": trace(student, of_student)}
    if "teacher" not in trainings(config):
        return found
    teacher = Teacher(config, classes, initial=False).train()

    def of_teacher(count: int) -> Tensor:
        pixels, labels = batch(count)
        return F.cross_entropy(teacher(pixels), labels)

    return {"teacher": trace(teacher, of_teacher), **found}


def plan_model(
    kind: str,
    found: Trace,
    config: Config,
    deepspeed: dict[str, Any],
    cluster: Cluster,
    images: int,
) -> ModelPlan:
    """Plan the training of one model.

    Raises:
        UserError: the global batch can't be shared by the ranks, or a run would refuse the DeepSpeed config.
    """
    settings: TrainConfig = config.teacher if kind == "teacher" else config.student
    accumulation = accumulation_for(
        settings.global_batch, cluster.ranks, settings.max_micro_batch, f"{kind}.global_batch"
    )
    resolved = resolve_deepspeed(
        config, kind, deepspeed, cluster.ranks, accumulation, "cuda" if cluster.on_gpu else "cpu"
    )
    stage = int(resolved["zero_optimization"]["stage"])
    zero = deepspeed.get("zero_optimization", {})
    micro = settings.global_batch // cluster.ranks // accumulation
    kept = found.fixed + micro * (found.kept + found.largest)
    half = constants.HALF if cluster.on_gpu and config.precision != "float32" else 1.0

    def memory(number: int) -> Memory:
        bucket = _bucket(zero, found.parameters, cluster.on_gpu) if number else 0
        needs = states(
            found.parameters,
            stage=number,
            ranks=cluster.ranks,
            optimizer=settings.optimizer,
            average=settings.average != "none",
            bucket=bucket,
        )
        return Memory(number, needs, half * kept + found.buffers)

    rows = micro * accumulation
    work = (1 + constants.BACKWARD) * found.flops * rows
    sent, rate = sent_in_a_step(found.parameters, stage, cluster.ranks), cluster.rate(kind)
    return ModelPlan(
        kind,
        found,
        micro,
        accumulation,
        stage,
        tuple(memory(number) for number in STAGES),
        sent,
        steps=settings.epochs * (images // settings.global_batch),
        compute_s=None if rate is None else work / rate + constants.OWN_STEP_S,
        network_s=_network_s(sent, cluster),
    )


def _network_s(sent: float, cluster: Cluster) -> float | None:
    if cluster.nodes == 1:
        return 0.0  # ranks on the same node exchange data through its memory
    if cluster.bytes_per_s is None:
        return None
    # A ring enters and leaves each node once, however many ranks it has.
    return ring_seconds(sent, cluster.nodes, cluster.bytes_per_s, constants.LATENCY_S)


def efficiency(plan: ModelPlan, cluster: Cluster, nodes: int, gbit: float) -> float | None:
    """Share of a step that is spent computing, on this many such nodes; None: unknown.

    A rank keeps the plan's micro-batch (weak scaling). No overlap is assumed, although DeepSpeed on GPUs hides
    part of the gradient exchange behind the backward pass.
    """
    if plan.compute_s is None:
        return None
    ranks = nodes * cluster.ranks_per_node
    sent = sent_in_a_step(plan.trace.parameters, plan.stage, ranks)
    larger = Cluster(
        nodes, cluster.ranks_per_node, cluster.on_gpu, cluster.flops, gbit * 1e9 / 8, cluster.cores
    )
    network = _network_s(sent, larger)
    assert network is not None
    return plan.compute_s / (plan.compute_s + network)


def _bucket(zero: dict[str, Any], parameters: int, on_gpu: bool) -> int:
    """Values of a bucket; on a CPU its untouched pages take no memory."""
    given = zero.get("reduce_bucket_size", "auto")
    size = 500_000_000 if given == "auto" else int(float(given))
    return size if on_gpu else min(size, parameters)


def graph_sizes(config: Config, images: int, cluster: Cluster) -> memory_model.Sizes:
    """The graph of this config, for the memory model."""
    parts = max(config.graph.partition.parts, cluster.ranks)
    first, second = memory_model.halos(cluster.ranks)
    return memory_model.Sizes(
        images=images,
        dim=config.student.dim,
        graph_dim=config.graph.dim,
        candidates=config.graph.candidates,
        parts=parts,
        ranks=cluster.ranks,
        halo1=first,
        halo2=second,
        searched=config.graph.sampling.query == "live",
        averaged=config.graph.sampling.second_hop == "cached",
    )


def disk(
    config: Config, images: int, classes: int, traces: dict[str, Trace], image_bytes: float
) -> dict[str, float]:
    """Bytes on shared storage, by kind."""
    top, whole = (
        min(config.targets.top_k or classes, classes),
        images * max(1, config.targets.views),
    )
    per_class = 2 + (np.min_scalar_type(classes - 1).itemsize if top < classes else 0)
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best
    rows = {
        "training images (shards)": image_bytes * images,
        "soft targets, before compression": whole * (6 * top + 12),  # float16, int32; id and view
        "soft targets as arrays": float(whole * top * per_class),
    }
    if config.graph.scope == "dataset":
        parts = Cluster(1, config.graph.partition.parts, False, None, None, 1)
        found = memory_model.structures(graph_sizes(config, images, parts))
        versions = config.graph.keep_versions + 1  # those of the stage student, and that of graph
        rows[f"graph versions ({versions})"] = versions * memory_model.total(found, "disk")
        rows["the model, with its memory"] = memory_model.total(found, "model")
    runs_of = {kind: 1 for kind in traces}
    runs_of["student"] += "control" in trainings(config)
    for kind, runs in runs_of.items():
        settings: TrainConfig = config.teacher if kind == "teacher" else config.student
        needs = states(
            traces[kind].parameters, stage=1, ranks=1,
            optimizer=settings.optimizer, average=settings.average != "none",
        )  # fmt: skip
        who = "student and control" if runs == 2 else kind
        rows[f"checkpoints of the {who} ({kept})"] = runs * kept * needs.optimizer
    return {name: size for name, size in rows.items() if size}


def refresh_bytes(config: Config, images: int, cluster: Cluster) -> dict[str, float]:
    """Bytes that a refresh of the graph moves, summed over hosts; empty for a run without one."""
    if config.graph.scope != "dataset":
        return {}
    sizes = graph_sizes(config, images, cluster)
    row = 2 * sizes.dim + 4 * sizes.graph_dim
    table = 4 * images * sizes.candidates
    return {
        "features and projections, written": float(images * row),
        "projections, read by each host to search": float(
            4 * sizes.graph_dim * images * cluster.nodes
        ),
        "candidates, written and read by each host": float(table * (1 + cluster.nodes)),
        "halos, read by the ranks": images * (sizes.halo1 + sizes.halo2) * row,
    }


def hours(
    config: Config, images: int, plans: dict[str, ModelPlan], cluster: Cluster, decode_s: float
) -> dict[str, float] | None:
    """Hours of each stage; None if the speed of the ranks or of the network is unknown."""
    student = plans["student"]
    times = [p for plan in plans.values() for p in (plan.compute_s, plan.network_s)]
    if cluster.flops is None or None in times:
        return None

    def passes(seconds: float, count: float) -> float:
        """Hours of ``count`` passes over the images, limited by the models or by decoding."""
        decode = images * decode_s / (cluster.nodes * cluster.cores)
        together = seconds + count * decode
        return (max(seconds, count * decode) if cluster.on_gpu else together) / 3600

    def training(plan: ModelPlan, settings: TrainConfig) -> float:
        assert plan.compute_s is not None
        assert plan.network_s is not None
        share = _size_share(config, settings)
        seconds = plan.steps * (share * plan.compute_s + plan.network_s)
        return passes(seconds, settings.epochs)

    def forward(plan: ModelPlan, count: float) -> float:
        rate = cluster.rate(plan.kind)
        assert rate is not None
        return passes(count * images * plan.trace.flops / (rate * cluster.ranks), count)

    graph, found = config.graph, dict[str, float]()
    if (teacher := plans.get("teacher")) is not None:
        found["teacher"] = training(teacher, config.teacher)
        found["targets"] = forward(teacher, max(1, config.targets.views))
    found["student"] = training(student, config.student)
    if graph.scope == "dataset":
        later = max(0, config.student.epochs - graph.start_epoch)
        builds = 1 + math.ceil(later / graph.refresh_epochs)
        found["graph: embedding, without the search"] = forward(student, builds)
    if "control" in trainings(config):
        found["control"] = training(student, config.student)
    return found


def _size_share(config: Config, settings: TrainConfig) -> float:
    """Work of a training relative to one with full-size images in every epoch (``early_size``)."""
    full = config.views.size
    sizes = [
        size_at(epoch, settings.epochs, full, settings.early_size, settings.early_share)
        for epoch in range(settings.epochs)
    ]
    return sum((size / full) ** 2 for size in sizes) / max(1, len(sizes))
