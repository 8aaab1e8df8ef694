"""The arguments of ``cnn2gnn plan``."""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn plan``."""
    parser.description = (
        "Size of every structure of the graph, on disk and in memory; runs nothing."
    )
    parser.add_argument("--images", type=int, required=True, metavar="N", help="training images")
    for name, metavar, text in (
        ("--dim", "D", "width of the features, student.dim; default 128"),
        ("--graph-dim", "d", "width of the projections, graph.dim; default 64"),
        ("--candidates", "M", "graph.candidates; default 20"),
        ("--parts", "P", "graph.partition.parts; default 8"),
        ("--ranks", "R", "default: one per partition"),
    ):
        parser.add_argument(name, type=int, metavar=metavar, help=text)
    for name in ("--halo1", "--halo2"):
        parser.add_argument(name, type=float, metavar="H", help="halo nodes per inner node")
    parser.add_argument(
        "--live",
        dest="searched",
        action="store_true",
        help="include the index of graph.sampling.query=live",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands import plan

    names = [
        "images",
        "dim",
        "graph_dim",
        "candidates",
        "parts",
        "ranks",
        "halo1",
        "halo2",
        "searched",
    ]
    given = {name: getattr(arguments, name) for name in names}
    return plan.command(given, as_json=arguments.json)
