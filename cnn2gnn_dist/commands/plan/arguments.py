"""The arguments of ``cnn2gnn plan``."""

from __future__ import annotations

import argparse
from typing import Any

from cnn2gnn_dist.errors import UserError

GRAPH = ("dim", "graph_dim", "candidates", "parts", "halo1", "halo2", "searched", "averaged")
RUN = (
    "config",
    "teacher",
    "student",
    "nodes",
    "gpus",
    "cores",
    "gflops",
    "gbit",
    "image_bytes",
    "decode_ms",
    "scaling",
    "overrides",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn plan``."""
    parser.description = (
        "What a run needs, before you rent a machine. With --classes: the complete run (memory per rank under "
        "each ZeRO stage, hosts, storage, network, hours; tracing the models takes a few seconds). Without: "
        "the size of every structure of the graph. Nothing is trained."
    )
    parser.add_argument("--images", type=int, required=True, metavar="N", help="training images")
    parser.add_argument("--ranks", type=int, metavar="R",
                        help="default: one per partition; of a run: per host without GPUs, one per core")  # fmt: skip
    _complete_run(parser.add_argument_group("the complete run"))
    _graph_alone(parser.add_argument_group("the graph alone"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=_run)


def _complete_run(run: argparse._ArgumentGroup) -> None:
    run.add_argument("--classes", type=int, metavar="C", help="number of classes")
    run.add_argument("--config", metavar="FILE_OR_PRESET",
                     help="the run's models, batches, epochs and views; default: every field's default")  # fmt: skip
    run.add_argument("--teacher", metavar="ARCH", help="teacher.arch")
    run.add_argument("--student", metavar="STEM", help="student.stem")
    run.add_argument("--nodes", type=int, metavar="N", help="hosts; default 1")
    run.add_argument(
        "--gpus", type=int, metavar="G", help="GPUs per host; default 0: each rank is a core"
    )
    run.add_argument(
        "--cores", type=int, metavar="N", help="cores per host; default: as many as here"
    )
    run.add_argument("--gflops", type=float, metavar="F",
                     help="GFLOP/s that a rank sustains in training; default for a core: docs/sizing.md")  # fmt: skip
    run.add_argument(
        "--gbit",
        type=float,
        metavar="B",
        help="network bandwidth of a host, in gigabits per second",
    )
    run.add_argument("--image-bytes", type=float, metavar="B", help="mean size of an image file")
    run.add_argument("--decode-ms", type=float, metavar="MS",
                     help="milliseconds that a core takes to decode an image; default: as measured")  # fmt: skip
    run.add_argument(
        "--scaling", action="store_true", help="also show the efficiency on 1 to 64 such nodes"
    )
    run.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="overrides of the config"
    )


def _graph_alone(graph: argparse._ArgumentGroup) -> None:
    for name, metavar, text in (
        ("--dim", "D", "width of the features, student.dim; default 128"),
        ("--graph-dim", "d", "width of the projections, graph.dim; default 64"),
        ("--candidates", "M", "graph.candidates; default 20"),
        ("--parts", "P", "graph.partition.parts; default 8"),
    ):
        graph.add_argument(name, type=int, metavar=metavar, help=text)
    for name in ("--halo1", "--halo2"):
        graph.add_argument(name, type=float, metavar="H", help="halo nodes per inner node")
    graph.add_argument(
        "--live",
        dest="searched",
        action="store_true",
        help="include the index of graph.sampling.query=live",
    )
    graph.add_argument(
        "--cached",
        dest="averaged",
        action="store_true",
        help="assume graph.sampling.second_hop=cached: averages instead of the second halo",
    )


def _run(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    if given["classes"] is not None:
        _refuse(
            given, GRAPH, "only for the graph alone: a run takes it from the config", "an override"
        )
        return _run_plan(given)
    _refuse(given, RUN, "only for a complete run", "--classes")
    from cnn2gnn_dist.commands.plan import graph as plan

    names = ("images", "ranks", *GRAPH)
    return plan.command({name: given[name] for name in names}, as_json=arguments.json)


def _run_plan(given: dict[str, Any]) -> int:
    from cnn2gnn_dist.commands.plan import training as plan_training

    named = {"teacher.arch": given["teacher"], "student.stem": given["student"]}
    overrides = [f"{field}={value}" for field, value in named.items() if value is not None]
    decode_ms = given["decode_ms"]
    return plan_training.command(
        given["config"],
        [*overrides, *given["overrides"]],
        images=given["images"],
        classes=given["classes"],
        cluster=plan_training.cluster_of(given),
        image_bytes=given["image_bytes"] or 0.0,
        decode_s=None if decode_ms is None else decode_ms / 1000,
        scaling=given["scaling"],
        as_json=given["json"],
    )


def _refuse(given: dict[str, Any], names: tuple[str, ...], what: str, remedy: str) -> None:
    for name in names:
        if given[name] not in (None, False, []):
            option = name if name == "overrides" else f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is {what}", where=option, remedy=remedy)
