"""``cnn2gnn plan --config …``: what a complete run needs from its hosts, and for how long."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from cnn2gnn_dist import settings
from cnn2gnn_dist.commands.plan import constants, estimate
from cnn2gnn_dist.commands.plan.estimate import Cluster, ModelPlan
from cnn2gnn_dist.commands.plan.graph import size_of
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.batch_sizes import check_parts
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph import memory_model
from cnn2gnn_dist.log import output
from cnn2gnn_dist.pipeline import keys
from cnn2gnn_dist.runtime.hosts import allotted
from cnn2gnn_dist.stages.shared import preflight
from cnn2gnn_dist.training.precision import choose

_log = logging.getLogger(__name__)

NODES, GBITS = (1, 2, 4, 8, 16, 32, 64), (10, 25, 100, 400)
"""Rows and columns of the table of efficiencies."""
TRACED_BANK = 4096
"""Rows of the bank in a trace: what a step keeps depends on the blocks, not on the number of nodes."""


def command(
    source: str | None,
    overrides: list[str],
    *,
    images: int,
    classes: int,
    cluster: Cluster,
    image_bytes: float = 0.0,
    decode_s: float | None = None,
    scaling: bool = False,
    as_json: bool = False,
) -> int:
    """Print the plan of a run; returns 0.

    Args:
        source: the config: a preset or a file; None: every field's default.
        overrides: of the config.
        images: number of training images.
        classes: number of classes.
        cluster: the hosts.
        image_bytes: mean size of an encoded image; 0: the shards are left out.
        decode_s: seconds that a core takes for an image; None: as measured for photographs or small images.
        scaling: also print how efficient steps are on more nodes and other networks.
        as_json: print one JSON object.

    Raises:
        UserError: a mistake in the config; a batch that the ranks can't share, or that has more images than
            there are.
    """
    config = settings.load(source, overrides)
    for name, given in (("images", images), ("classes", classes)):
        if given < 2:
            raise UserError(f"{name} = {given}", where=f"--{name}", remedy="at least 2")
    preflight.check_images(config, [*estimate.trainings(config), "graph"], images)
    if cluster.flops is None and not cluster.on_gpu:
        precision = str(choose(config.precision, "cpu", {})).removeprefix("torch.")
        cluster = replace(cluster, flops=1e9 * constants.CPU_GFLOPS[precision])
    if config.graph.scope == "dataset":
        _say_parts(config, cluster)
    plan = _planned(config, images, classes, cluster, image_bytes, decode_s)
    if as_json:
        output(json.dumps({"cluster": asdict(cluster), **asdict(plan)}, indent=1))
        return 0
    output(
        f"{images:,} images of {classes:,} classes, {f'config {source}' if source else 'default config'}: "
        f"{cluster.nodes} nodes x "
        f"{cluster.ranks_per_node} {'GPUs' if cluster.on_gpu else 'cores'}, {cluster.ranks} ranks"
    )
    _print_plan(plan, cluster, scaling)
    return 0


def _say_parts(config: Config, cluster: Cluster) -> None:
    """Warn of partitions that a run on these ranks would refuse; the plan has as many as it needs."""
    try:
        check_parts(config.graph.partition.parts, cluster.ranks, config.student.global_batch)
    except UserError as error:
        _log.warning(f"a run on these ranks is refused: {error.what}; {error.remedy}")


@dataclass(frozen=True)
class _RunPlan:
    """What a run needs: bytes by what holds or sends them, and hours by stage (None: unknown)."""

    models: dict[str, ModelPlan]
    host: dict[str, float]
    disk: dict[str, float]
    refresh: dict[str, float]
    hours: dict[str, float] | None


def _planned(
    config: Config,
    images: int,
    classes: int,
    cluster: Cluster,
    image_bytes: float,
    decode_s: float | None,
) -> _RunPlan:
    deepspeed = keys.read_deepspeed(config)
    traces = estimate.trace_models(config, classes, min(images, TRACED_BANK))
    models = {
        kind: estimate.plan_model(kind, found, config, deepspeed[kind], cluster, images)
        for kind, found in traces.items()
    }
    if decode_s is None:
        kind = "small" if config.views.size <= constants.SMALL else "photograph"
        decode_s = constants.DECODE_S[kind]
    return _RunPlan(
        models,
        host=_host(config, images, models, cluster),
        disk=estimate.disk(config, images, classes, traces, image_bytes),
        refresh=estimate.refresh_bytes(config, images, cluster),
        hours=estimate.hours(config, images, models, cluster, decode_s),
    )


def _host(
    config: Config, images: int, plans: dict[str, ModelPlan], cluster: Cluster
) -> dict[str, float]:
    """Bytes of a host's memory while the more demanding of the models trains."""
    rows = max(plan.micro_batch for plan in plans.values())
    waiting = config.stream.prefetch * rows * 3 * config.views.size**2
    most = max(plan.memory[plan.stage].total for plan in plans.values())
    of_rank = {"processes": float(constants.PROCESS)}
    if config.graph.scope == "dataset":
        sizes = estimate.graph_sizes(config, images, cluster)
        bank = memory_model.total(memory_model.structures(sizes), "rank")
        of_rank["graph (halos included)"] = bank
    of_rank["prefetched batches"] = waiting
    if not cluster.on_gpu:
        of_rank["the larger model, in training"] = most
    return {name: size * cluster.ranks_per_node for name, size in of_rank.items()}


def _print_plan(plan: _RunPlan, cluster: Cluster, scaling: bool) -> None:
    for model in plan.models.values():
        _print_model(model)
    for model in plan.models.values() if scaling else ():
        _print_scaling(model, cluster)
    _print_sizes("memory of a host, in training", plan.host)
    _print_sizes("shared storage", plan.disk)
    if plan.refresh:
        _print_sizes("network: a refresh of the graph", plan.refresh)
    _print_hours(plan.hours, cluster)


def _print_model(plan: ModelPlan) -> None:
    found = plan.trace
    output(
        f"\n{plan.kind}: {found.parameters:,} parameters, {found.flops / 1e9:,.3g} GFLOP per image; "
        f"{plan.steps:,} steps of {plan.accumulation} x {plan.micro_batch} images per rank\n"
        "  memory of a rank      weights   gradients   optimizer     buckets activations       total"
    )
    for one in plan.memory:
        parts = one.states
        columns = [
            parts.weights, parts.gradients, parts.optimizer, parts.buckets, one.activations, one.total,
        ]  # fmt: skip
        mark = "  <- this config" if one.stage == plan.stage else ""
        output(f"  ZeRO {one.stage}      " + "".join(f"{size_of(c):>12}" for c in columns) + mark)
    line = f"  a step: {size_of(plan.sent)} sent per rank"
    if plan.compute_s is not None:
        line += f", {plan.compute_s:.3g} s to compute"
        if plan.network_s is not None:
            share = plan.compute_s / (plan.compute_s + plan.network_s)
            line += (
                f", {plan.network_s:.3g} s on the network (efficiency {share:.2f}, not overlapped)"
            )
    if plan.network_s is None:
        line += "; with --gbit, also how long that takes"
    output(line)


def _print_scaling(plan: ModelPlan, cluster: Cluster) -> None:
    if plan.compute_s is None:
        return
    output(
        f"\n{plan.kind}: efficiency of a step of {plan.micro_batch} images per rank, not overlapped\n"
        + "  nodes   " + "".join(f"{f'{gbit} Gbit/s':>13}" for gbit in GBITS)
    )  # fmt: skip
    for nodes in NODES:
        found = [estimate.efficiency(plan, cluster, nodes, gbit) for gbit in GBITS]
        output(f"  {nodes:5}   " + "".join(f"{one:13.2f}" for one in found))


def _print_sizes(title: str, rows: dict[str, float]) -> None:
    output(f"\n{title}")
    for name, size in rows.items():
        output(f"  {name:44} {size_of(size):>12}")
    output(f"  {'total':44} {size_of(sum(rows.values())):>12}")


def _print_hours(rows: dict[str, float] | None, cluster: Cluster) -> None:
    if rows is None:
        missing = "--gflops" if cluster.flops is None else "--gbit"
        output(f"\nhours: unknown without {missing} (docs/sizing.md says how to measure it)")
        return
    output("\nhours")
    for name, hours in rows.items():
        output(f"  {name:44} {hours:12.2f}")
    output(f"  {'total':44} {sum(rows.values()):12.2f}")


def cluster_of(given: dict[str, Any]) -> Cluster:
    """The cluster of the command's options.

    Raises:
        UserError: a number below its minimum; a number of ranks for hosts whose GPUs are the ranks.
    """
    for name, least in (("nodes", 1), ("gpus", 0), ("cores", 1), ("ranks", 1)):
        if given[name] is not None and given[name] < least:
            raise UserError(
                f"{name} = {given[name]}", where=f"--{name}", remedy=f"at least {least}"
            )
    if given["gpus"] and given["ranks"]:
        raise UserError(
            f"each of a host's {given['gpus']} GPUs is a rank, so --ranks would have no effect",
            where="--ranks",
            remedy=f"leave it out, or --gpus {given['ranks']}",
        )
    for name in ("gflops", "gbit"):
        if given[name] is not None and not given[name] > 0:
            raise UserError(f"{name} = {given[name]}", where=f"--{name}", remedy="more than 0")
    on_gpu, gflops = bool(given["gpus"]), given["gflops"]
    cores = given["cores"] or allotted.cores()
    return Cluster(
        nodes=given["nodes"] or 1,
        ranks_per_node=given["gpus"] or given["ranks"] or cores,
        on_gpu=on_gpu,
        flops=None if gflops is None else 1e9 * gflops,
        bytes_per_s=None if given["gbit"] is None else given["gbit"] * 1e9 / 8,
        cores=cores,
    )
