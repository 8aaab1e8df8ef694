"""The arguments of ``cnn2gnn embed``."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn embed``."""
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="folder of a model or a run"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="Parquet file to write")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, folders, tar shards, Parquet files"
    )
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands.answers import embed

    return embed.command(Path(arguments.model), arguments.images, Path(arguments.out))
