"""The command-line interface, and nothing else."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cnn2gnn_dist import __version__, consistency, ledger, log, settings
from cnn2gnn_dist.commands import (
    audit_cli,
    checkpoint_cli,
    memory_cli,
    plan_cli,
    predict_cli,
    serve,
)
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.runtime.ray_session import ENDED_BY_SIGTERM

_log = logging.getLogger(__name__)

STAGES = {
    "teacher": "train the CNN under DeepSpeed",
    "targets": "write the teacher's soft targets to Parquet",
    "student": "distill into the GNN, refreshing the graph along the way",
    "graph": "build the final graph and its partitions: the bank that unseen images attach to",
    "control": "train the same stem with an MLP head and no graph",
    "evaluate": "evaluate all models on held-out images; table, plots, report",
    "model": "write the model: student, memory and card in a folder that answers on its own",
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
"""Packages that the base install does not bring, and the extra that does."""
EPILOG = """examples:
  cnn2gnn init photos/ --minutes 30                a config for your own images
  cnn2gnn run --config demo                        the digits, end to end
  cnn2gnn run --config cifar10 student.epochs=20   a preset with an override
  cnn2gnn run --config my.yaml --dry-run           what would run, and why
  cnn2gnn predict --model runs/demo images/*.png   classify images with a trained run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 success, 1 failure, 2 an error that the user can fix.

    130 and 143 after SIGINT and SIGTERM, with everything cleaned up.

    Raises:
        ModuleNotFoundError: a package that no extra brings.
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
        log.report_error("interrupted; the same command resumes the run")
        return 130
    except SystemExit as end:
        if end.code == ENDED_BY_SIGTERM:
            log.report_error("stopped by SIGTERM; the same command resumes the run")
        raise
    except BrokenPipeError:
        return 1
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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse options, with overrides before, after and between them (argparse allows one place only)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [text for text in rest if text.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        misplaced = settings.misplaced(unknown) if hasattr(arguments, "overrides") else None
        if misplaced is not None:
            raise misplaced
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cnn2gnn",
        description="Distill a deep CNN into a two-layer GNN over a sparse graph learned from images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    whole = commands.add_parser("run", help="run every stage, skipping complete ones")
    _config_arguments(whole)
    whole.set_defaults(command=_run, stages=None)
    for name, text in (
        ("pack", "pack images into WebDataset shards"),
        ("index", "build the manifests of existing or packed shards"),
        *STAGES.items(),
    ):
        stage = commands.add_parser(name, help=text, description=text)
        _config_arguments(stage)
        stage.set_defaults(command=_run, stages=[name])
    predict_cli.arguments(
        commands.add_parser("predict", help="classify image files with a trained run")
    )

    embed = commands.add_parser("embed", help="write features and projections of images as Parquet")
    embed.add_argument("--model", required=True, metavar="FOLDER", help="of a model or a run")
    embed.add_argument("--out", required=True, metavar="FILE", help="Parquet file to write")
    embed.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, folders, tar shards, Parquet files"
    )
    embed.set_defaults(command=_embed)
    export = commands.add_parser(
        "export", help="write the model of a finished run to a folder of its own"
    )
    export.add_argument("run", metavar="RUN", help="folder of a finished run, or of a model")
    export.add_argument("--to", required=True, metavar="MODEL", help="folder to write")
    export.add_argument("--force", action="store_true", help="replace a model that is there")
    export.add_argument(
        "--onnx", action="store_true", help="as ONNX graphs and arrays, to answer without torch"
    )
    export.set_defaults(command=_export)
    _init_arguments(commands.add_parser("init", help="write a config for your own images"))
    memory_cli.arguments(commands.add_parser("memory", help="inspect or edit a model's memory"))
    serve.arguments(commands.add_parser("serve", help="answer over HTTP, with a page"))
    audit_cli.arguments(commands.add_parser("audit", help="find faults of a training set"))
    checkpoint_cli.arguments(
        commands.add_parser("checkpoint", help="list, inspect, verify or export checkpoints")
    )
    plan_cli.arguments(
        commands.add_parser("plan", help="estimate memory and disk for a number of images")
    )
    doctor = commands.add_parser("doctor", help="check this machine and suggest fixes")
    doctor.set_defaults(command=_doctor)
    fields = commands.add_parser(
        "config", help="list every field with its default and meaning, and the presets"
    )
    fields.add_argument(
        "--config", metavar="FILE_OR_PRESET", help="print this config, resolved, instead"
    )
    fields.add_argument("overrides", nargs="*", metavar="section.field=value")
    fields.set_defaults(command=_fields)
    _add_verbosity(commands)
    return parser


def _add_verbosity(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``-v`` and ``-q`` to every command, at any depth."""
    for parser in commands.choices.values():
        log.add_options(parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                _add_verbosity(action)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE_OR_PRESET",
        default="demo",
        help=f"YAML file or preset ({', '.join(settings.presets())}); default demo",
    )
    parser.add_argument("--dry-run", action="store_true", help="print config and plan, run nothing")
    parser.add_argument(
        "--update",
        action="store_true",
        help="if config or inputs changed: set old results aside and recompute them",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="the same, but training resumes from its checkpoint under the new config",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="see `cnn2gnn config`; text is taken as typed, null means none; the last override "
        "of a field wins",
    )


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at images, time the networks here, and write a config that fits both."
    )
    place = (
        "folder of class folders, Parquet files or tar shards; with train and val parts, or without"
    )
    parser.add_argument("place", metavar="IMAGES", help=place)
    parser.add_argument(
        "--out", metavar="FILE", default="my.yaml", help="config to write; default my.yaml"
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="time for the whole run; default 30"
    )
    parser.add_argument("--weights", metavar="FILE", help="pretrained weights of a teacher")
    parser.add_argument("--dry-run", action="store_true", help="print the config, write nothing")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.set_defaults(command=_init)


def _init(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands import init

    given = {"weights_file": arguments.weights, "dry_run": arguments.dry_run}
    return init.command(
        arguments.place, arguments.out, arguments.minutes, force=arguments.force, **given
    )


def _run(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.pipeline import keys, runner
    from cnn2gnn_dist.unused_fields import Surroundings

    config = settings.load(arguments.config, arguments.overrides, _log.warning)
    _warn_if_run_moved(arguments.config, config)
    if arguments.dry_run:
        log.output(settings.as_yaml(config))
        steps = runner.plan(config, arguments.stages)
        for step in steps:
            log.output(f"{step.stage.name:10} {step.status.value:12} {step.why}")
        deepspeed = keys.read_deepspeed(config)
        surroundings = Surroundings(config.device == "cuda", deepspeed=deepspeed)
        for note in consistency.notes(config, surroundings):
            log.output(f"note: {note}")
        runner.check_remaining(config, steps, config.run.ranks, deepspeed)
        return 0
    _warn_if_results_are_lost(config)
    runner.plan(config, arguments.stages)  # refuses an unknown stage before starting Ray
    if runner.needs_no_group(config, arguments.stages):
        tree = settings.as_tree(config)
        runner.run_rank(tree, arguments.stages, arguments.update, False, Ranks(), arguments.force)
    else:
        _on_ray(config, arguments.stages, arguments.update, arguments.force)
    if arguments.stages in (None, ["evaluate"]):
        _print_summary(config)
    return 0


def _on_ray(config: Config, stages: list[str] | None, update: bool, force: bool) -> None:
    """Run all ranks as Ray actors, here or on the cluster at ``cluster.address``."""
    from cnn2gnn_dist.pipeline import keys, runner
    from cnn2gnn_dist.runtime import ray_group, rendezvous

    cluster, ranks = config.cluster, config.run.ranks
    if not (cluster.address or os.environ.get("RAY_ADDRESS")):
        # The ranks will run here: what they would refuse is refused before Ray is started.
        on_gpu = runner.choose_device(config.device) == "cuda"
        rendezvous.check_interfaces("nccl" if on_gpu else "gloo")
    with ray_group.running(cluster.address, ranks, logs=Path(str(config.run.dir)) / "ray-logs"):
        on_gpu = config.device != "cpu" and ray_group.gpus() >= ranks
        if config.device == "cuda" and not on_gpu:
            raise UserError(
                f"the config asks for {ranks} GPUs, but Ray has {ray_group.gpus()}",
                where="device",
                remedy="device=cpu, device=auto, or fewer ranks: run.ranks=…",
            )
        spec = ray_group.GroupSpec(
            ranks, cluster.cpus_per_rank, float(on_gpu), cluster.max_failures, cluster.grace_s
        )
        outcome = ray_group.run_group(
            "cnn2gnn_dist.pipeline.runner:run_rank",
            {
                "tree": settings.as_tree(config) | {"device": "cuda" if on_gpu else "cpu"},
                "names": stages,
                "update": update,
                "inside_ray": True,
                "force": force,
                "deepspeed": keys.read_deepspeed(config),  # the ranks' working directory differs
            },
            spec,
        )
    for name, why in outcome[0].items():
        if why == "complete, skipped":
            runner.log_skipped(name)


def _warn_if_run_moved(name: str | None, config: Config) -> None:
    """A run's own config names the folder where it was made, which may no longer exist."""
    folder, named = Path(name or "").parent, Path(str(config.run.dir))
    of_a_run = Path(name or "").name == ledger.CONFIG and (folder / "manifest").is_dir()
    if of_a_run and not named.exists():
        _log.warning(
            f"this is the config of the run in {folder}, but it names run.dir={named}, which "
            f"does not exist; to continue that run: run.dir={folder}"
        )


def _warn_if_results_are_lost(config: Config) -> None:
    """In a submitted job relative paths are inside a copy of the working directory."""
    inside = Path(str(config.run.dir)).is_relative_to(Path.cwd())
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and inside:
        _log.warning(
            f"this job writes to {config.run.dir}, inside Ray's copy of the working "
            "directory; set run.dir=/shared/path to keep the results"
        )


def _print_summary(config: Config) -> None:
    from cnn2gnn_dist.stages.evaluate import table

    root = Path(str(config.run.dir))
    report = root / "report.html"
    log.output("\n" + table(json.loads((root / "results.json").read_text(encoding="utf-8"))))
    log.output(f"\nresults  {root / 'results.json'}")
    if report.exists():
        log.output(f"look     {report}")
    log.output(f"model    {root / 'model'}")
    log.output(f"predict  cnn2gnn predict --model {root} IMAGE…")
    log.output(f"serve    cnn2gnn serve {root}")
    log.output(f"audit    cnn2gnn audit {root}")
    log.output("next     cnn2gnn run --config cifar10, or your own images: cnn2gnn init FOLDER")


def _embed(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands import embed

    return embed.command(Path(arguments.model), arguments.images, Path(arguments.out))


def _export(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands import export

    if arguments.onnx:
        return export.onnx(Path(arguments.run), Path(arguments.to))
    return export.command(Path(arguments.run), Path(arguments.to), force=arguments.force)


def _doctor(arguments: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands import doctor

    return doctor.command()


def _fields(arguments: argparse.Namespace) -> int:
    if arguments.config or arguments.overrides:
        log.output(
            settings.as_yaml(settings.load(arguments.config, arguments.overrides, _log.warning)),
            end="",
        )
        return 0
    log.output(settings.describe())
    log.output(f"\npresets: {', '.join(settings.presets())}   (cnn2gnn config --config demo)")
    return 0
