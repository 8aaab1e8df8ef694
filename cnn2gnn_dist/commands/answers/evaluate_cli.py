"""The arguments of ``cnn2gnn evaluate``: a stage of a run, or any model on labeled images."""

from __future__ import annotations

import argparse
from pathlib import Path

from cnn2gnn_dist.commands.run import run_cli
from cnn2gnn_dist.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the stage's parser doesn't have."""
    group = parser.add_argument_group(
        "any model", "evaluate --model FOLDER IMAGES…: a model's accuracy on labeled images"
    )
    group.add_argument(
        "--model",
        metavar="FOLDER",
        help="folder of a model or of a finished run, or URL of a run.storage; then name, instead of fields, "
        "folders with a folder of images for each class, tar shards, Parquet files",
    )
    group.add_argument(
        "--label-column",
        default="label",
        metavar="NAME",
        help="column of the classes in Parquet files (default: label)",
    )
    group.add_argument(
        "--out", metavar="FILE.json", help="write all figures, with the confusion matrix"
    )
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        if arguments.out is not None or arguments.label_column != "label":
            raise UserError(
                "--out and --label-column are for a model",
                where="evaluate",
                remedy="--model FOLDER; a run writes its figures to results.json",
            )
        images = [text for text in arguments.overrides if "=" not in text and Path(text).exists()]
        if images:
            raise UserError(
                "the model that is to answer these images isn't named",
                where=images[0],
                remedy=f"cnn2gnn evaluate --model FOLDER {images[0]}",
            )
        return run_cli.run(arguments)
    if arguments.dry_run or arguments.update or arguments.force:
        raise UserError(
            "--dry-run, --update and --force are for a run's stage, not for a model",
            where="evaluate --model",
            remedy="leave them out",
        )
    if not arguments.overrides:
        raise UserError(
            "no labeled images are named",
            where="evaluate --model",
            remedy="name folders with a folder of images for each class, tar shards, Parquet files",
        )
    from cnn2gnn_dist.commands.answers import evaluate
    from cnn2gnn_dist.commands.run.stored_run import model_at

    with model_at(arguments.model) as model:
        return evaluate.command(
            model,
            arguments.overrides,
            label_column=arguments.label_column,
            out=None if arguments.out is None else Path(arguments.out),
        )
