"""The command-line interface, and nothing else."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cnn2gnn_dist import __version__, log, presets, submit
from cnn2gnn_dist.commands.answers import embed_cli, evaluate_cli, predict_cli
from cnn2gnn_dist.commands.audit import arguments as audit_cli
from cnn2gnn_dist.commands.init import arguments as init_cli
from cnn2gnn_dist.commands.model import export_cli, memory_cli, serve
from cnn2gnn_dist.commands.plan import arguments as plan_cli
from cnn2gnn_dist.commands.run import checkpoint_cli, run_cli
from cnn2gnn_dist.errors import UserError

_log = logging.getLogger(__name__)

STAGES = {
    "pack": "pack images into WebDataset shards",
    "index": "build the manifests of existing or packed shards",
    "teacher": "train the CNN under DeepSpeed",
    "targets": "write the teacher's soft targets to Parquet",
    "student": "distill into the GNN, refreshing the graph along the way",
    "graph": "build the final graph and its partitions: the bank that unseen images attach to",
    "control": "train the same stem with an MLP head and no graph",
    "evaluate": "evaluate all models of a run on its held-out images, or any model on labeled images",
    "model": "write the model: student, memory and card, in a self-contained folder",
}
_TRAIN = (
    *("ray", "deepspeed", "dgl", "pandas", "webdataset", "sklearn", "tensorboard", "matplotlib"),
    *("braceexpand", "jinja2", "fsspec"),
)
_EXTRAS = {
    **dict.fromkeys(_TRAIN, "train"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    **dict.fromkeys(("fastapi", "uvicorn", "multipart", "prometheus_client"), "serve"),
}
"""Packages that are not in the base install, and the extra that installs each."""
EPILOG = """examples:
  cnn2gnn init photos/ --minutes 30                a config for your own images
  cnn2gnn run --config demo                        the digits, end to end
  cnn2gnn run --config cifar10 student.epochs=20   a preset with an override
  cnn2gnn run --config my.yaml --dry-run           what would run, and why
  cnn2gnn predict --model runs/demo images/*.png   classify images with a trained run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 success, 1 failure, 2 an error that the user can fix.

    130 and 143 after SIGINT and SIGTERM, with everything cleaned up; 141 if the reader of the output is gone.

    Raises:
        ModuleNotFoundError: a package is missing that no extra installs.
        SystemExit: raised by argparse (``--help``: 0, a wrong option: 2), and on SIGTERM (143).
    """
    try:
        arguments = _parse(argv)
    except UserError as error:
        log.report_error(error)
        return error.exit_code
    if isinstance(sys.stdout, io.TextIOWrapper):
        # In a file or pipe the ranks' lines would otherwise arrive in blocks, minutes late.
        sys.stdout.reconfigure(line_buffering=True)
    try:
        with log.console(getattr(arguments, "verbosity", log.NORMAL)):
            return arguments.command(arguments) or 0
    except UserError as error:
        log.report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        log.report_error(f"interrupted{_resuming(arguments)}")
        return 130
    except SystemExit as end:
        from cnn2gnn_dist.runtime.ray.session import ENDED_BY_SIGTERM

        if end.code == ENDED_BY_SIGTERM:
            log.report_error(f"stopped by SIGTERM{_resuming(arguments)}")
        raise
    except BrokenPipeError:
        _let_go_of_closed_pipes()
        return 141  # as a shell says it of a program that SIGPIPE ended
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRAS:
            raise
        log.report_error(
            UserError(
                f"the package {error.name} is not installed",
                remedy=f"pip install 'cnn2gnn-dist[{_EXTRAS[error.name.partition('.')[0]]}]'",
            )
        )
        return 2


def _resuming(arguments: argparse.Namespace) -> str:
    """What to say of a command that continues where it was interrupted; others start over."""
    return "; the same command resumes" if getattr(arguments, "resumes", False) else ""


def _let_go_of_closed_pipes() -> None:
    """Write to a closed pipe no more: the interpreter would flush it once more at its end, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse options, with overrides before, after and between them (argparse allows one place only)."""
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        parser.exit(2)
    arguments, rest = parser.parse_known_args(argv)
    unknown = [text for text in rest if text.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        from cnn2gnn_dist import settings

        misplaced = settings.misplaced(unknown) if hasattr(arguments, "overrides") else None
        if misplaced is not None:
            raise misplaced
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


class _Parser(argparse.ArgumentParser):
    """Options are not abbreviated, nor are those of commands at any depth, whose parsers have this class, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="cnn2gnn",
        description="Distill a deep CNN into a two-layer GNN over a sparse graph learned from images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run_cli.arguments(
        commands.add_parser("run", help="run every stage, skipping complete ones"),
        None,
    )
    for name, text in STAGES.items():
        run_cli.arguments(commands.add_parser(name, help=text, description=text), [name])
    evaluate_cli.arguments(commands.choices["evaluate"])
    for name, text, arguments in COMMANDS:
        arguments(commands.add_parser(name, help=text, description=text))
    _add_verbosity(commands)
    return parser


def _add_verbosity(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``-v`` and ``-q`` to every command, at any depth."""
    for parser in commands.choices.values():
        log.add_options(parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                _add_verbosity(action)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="ask every node of a Ray cluster, or every host of srun or torchrun",
    )
    parser.add_argument("--address", metavar="HOST:6379", help="address of the Ray cluster")
    parser.add_argument("--folder", help="folder that all nodes should share, such as a run's")
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands.doctor import cluster as cluster_doctor
    from cnn2gnn_dist.commands.doctor import machine as doctor

    if arguments.cluster or arguments.address:
        return cluster_doctor.command(arguments.address, arguments.folder)
    return doctor.command()


def _field_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE_OR_PRESET", help="print this config, resolved, instead"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.set_defaults(command=_fields)


def _fields(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist import settings

    if arguments.config or arguments.overrides:
        log.output(
            settings.as_yaml(settings.load(arguments.config, arguments.overrides, _log.warning)),
            end="",
        )
        return 0
    log.output(settings.describe())
    log.output(f"\npresets: {', '.join(presets.names())}   (cnn2gnn config --config demo)")
    return 0


COMMANDS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    (
        "predict",
        "classify images, and show the training images the answers rest on",
        predict_cli.arguments,
    ),
    ("embed", "write features and projections of images as Parquet", embed_cli.arguments),
    ("export", "write a finished run's model to a separate folder", export_cli.arguments),
    ("init", "write a config for your own images", init_cli.arguments),
    ("memory", "inspect or edit a model's memory", memory_cli.arguments),
    ("serve", "serve a model over HTTP, with a web page to try it", serve.arguments),
    ("audit", "find faults in a training set", audit_cli.arguments),
    (
        "submit",
        "send a run to a Ray cluster, follow its log, return its exit code",
        submit.arguments,
    ),
    ("checkpoint", "list, inspect, verify or export checkpoints", checkpoint_cli.arguments),
    (
        "plan",
        "estimate memory, storage, network and hours of a run, before you rent a machine",
        plan_cli.arguments,
    ),
    ("doctor", "check this machine, or a cluster, and suggest fixes", _doctor_arguments),
    ("config", "list every field with its default and meaning, and the presets", _field_arguments),
)
"""Name, help and options of the commands other than stages."""
