"""The arguments of ``cnn2gnn export``."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn export``."""
    parser.add_argument(
        "run",
        metavar="RUN",
        help="folder of a finished run or of a model, or URL of a run.storage",
    )
    parser.add_argument("--to", required=True, metavar="MODEL", help="folder to write")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an existing model (not ONNX graphs or programs); what its memory has forgotten stays "
        "left out, other edits are lost",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--onnx", action="store_true", help="as ONNX graphs and arrays, to answer without torch"
    )
    kind.add_argument(
        "--torch-export",
        action="store_true",
        help="as programs of torch.export and arrays, to answer with torch alone",
    )
    kind.add_argument(
        "--control",
        action="store_true",
        help="the run's control instead of its student: the same stem with an MLP head, without graph and memory",
    )
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands.model import export
    from cnn2gnn_dist.commands.run.stored_run import model_at
    from cnn2gnn_dist.data.storage.urls import is_remote
    from cnn2gnn_dist.errors import UserError

    if arguments.force and (arguments.onnx or arguments.torch_export):
        raise UserError(
            "only the folder of a model is replaced, not that of exported graphs",
            where="--force",
            remedy="leave out --force, and name a folder that does not exist",
        )
    if arguments.control and is_remote(arguments.run):
        raise UserError(
            "of a stored run only its model is fetched, not its control",
            where=arguments.run,
            remedy="name the folder of the run on this machine, or leave out --control",
        )
    with model_at(arguments.run) as run:
        if arguments.onnx:
            return export.onnx(run, Path(arguments.to))
        if arguments.torch_export:
            return export.programs(run, Path(arguments.to))
        return export.command(
            run, Path(arguments.to), force=arguments.force, control=arguments.control
        )
