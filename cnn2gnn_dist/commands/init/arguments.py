"""The arguments of ``cnn2gnn init``."""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn init``."""
    parser.description = (
        "Look at images, time the networks here, and write a config that fits both."
    )
    place = (
        "folder of class folders, Parquet files or tar shards, with or without train and val parts"
    )
    parser.add_argument("place", metavar="IMAGES", help=place)
    parser.add_argument(
        "--out", metavar="FILE", default="my.yaml", help="config to write; default my.yaml"
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="time for the complete run; default 30"
    )
    parser.add_argument(
        "--idle", action="store_true",
        help="this machine is busy now but won't be during the run: measure processor time, not wall-clock time",
    )  # fmt: skip
    parser.add_argument(
        "--label-column", metavar="NAME",
        help="column of the classes in Parquet files; default: label, labels, class, fine_label, or the only one",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="FILE", help="pretrained weights for the teacher")
    parser.add_argument("--dry-run", action="store_true", help="print the config, write nothing")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands.init import command as init

    given = {
        name: getattr(arguments, name) for name in ("dry_run", "force", "idle", "label_column")
    }
    return init.command(
        arguments.place, arguments.out, arguments.minutes, weights_file=arguments.weights, **given
    )
