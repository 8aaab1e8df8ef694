"""The arguments of ``cnn2gnn checkpoint``."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn checkpoint``."""
    place = "folder of a run, of a stage in it (RUN/teacher), or a step-… folder; or the same of a run.storage URL"
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in (
        ("ls", "one line per checkpoint: position, size, age"),
        ("show", "what the newest one contains, and its config"),
        ("verify", "read everything and compare checksums; exit code 1 if a checkpoint is damaged"),
        ("export", "weights and buffers as one safetensors file with plain names"),
    ):
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("place", metavar="PLACE", help=place)
        one.set_defaults(command=_run, action=name)
        if name == "export":
            one.add_argument("--out", required=True, metavar="FILE", help="file to write")


def _run(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands.run import checkpoint as tool
    from cnn2gnn_dist.commands.run.stored_run import checkpoints_at

    with checkpoints_at(arguments.place) as place:
        if arguments.action == "export":
            return tool.export(place, Path(arguments.out))
        return tool.COMMANDS[arguments.action](place)
