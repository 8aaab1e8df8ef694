"""The arguments of ``cnn2gnn predict``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cnn2gnn_dist.commands.answers.importing import without_collection
from cnn2gnn_dist.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn predict``."""
    parser.add_argument(
        "--model",
        "--run",
        required=True,
        metavar="FOLDER",
        help="folder of a model (`cnn2gnn export`) or of a finished run, or URL of a run.storage",
    )
    parser.add_argument(
        "--top", type=int, default=3, help="classes shown for each image; default 3"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument(
        "--out",
        metavar="FILE_OR_FOLDER/",
        help="write the answers to a .jsonl, .csv, .parquet or .html file (with pictures); FOLDER/: one file "
        "per input, skipping existing ones; inputs are shared by the ranks of torchrun or srun, or by --actors",
    )
    parser.add_argument(
        "--format",
        default="parquet",
        metavar="KIND",
        help="format of the files in FOLDER/: parquet (default), jsonl, csv, html",
    )
    parser.add_argument(
        "--actors",
        type=int,
        default=0,
        metavar="N",
        help="with --out FOLDER/: distribute the inputs over N Ray actors",
    )
    parser.add_argument(
        "--address",
        metavar="HEAD:6379",
        help="Ray cluster of the actors (default: RAY_ADDRESS, or a Ray started on this host)",
    )
    parser.add_argument(
        "--coverage",
        type=float,
        metavar="SHARE",
        help="also give sets of classes that contain the true one with this probability, such as 0.95, for images "
        "like those that calibrated the model",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="answer the images together: for a burst, or images from one place",
    )
    parser.add_argument(
        "--same", action="store_true", help="like --together, for images that all show one class"
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, folders, tar shards, Parquet files"
    )
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands.run.stored_run import model_at

    with model_at(arguments.model) as model:
        return _predict(arguments, model)


def _predict(arguments: argparse.Namespace, model: Path) -> int:
    with without_collection():
        from cnn2gnn_dist.commands.answers import predict, predict_shards

    out: str | None = arguments.out
    asked = {"top": arguments.top, "coverage": arguments.coverage}
    to_folder = out is not None and (out.endswith("/") or os.path.isdir(out))
    if arguments.actors < 0 or (arguments.address and not arguments.actors):
        raise UserError(
            "the number of actors is missing or negative",
            where="--actors",
            remedy="--actors N, at least 1",
        )
    if arguments.actors and not to_folder:
        raise UserError(
            "actors write one file per input",
            where="--actors",
            remedy="--out FOLDER/, with the slash",
        )
    if out is not None and to_folder:
        if arguments.together or arguments.same:
            raise UserError(
                "images of all inputs are answered together, but FOLDER/ has one file per input",
                where=f"--out {out}",
                remedy="--out FILE",
            )
        arguments.resumes = True
        kind = f".{arguments.format.lstrip('.')}"
        over = {"actors": arguments.actors, "address": arguments.address}
        return predict_shards.command(
            model, arguments.images, Path(out), kind=kind, **asked, **over
        )
    return predict.command(
        model,
        arguments.images,
        as_json=arguments.json,
        out=None if out is None else Path(out),
        together=arguments.together,
        same=arguments.same,
        **asked,
    )
