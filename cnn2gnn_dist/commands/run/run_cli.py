"""The arguments of ``cnn2gnn run`` and of single stages; starts their ranks."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cnn2gnn_dist import ledger, log, presets
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ranks import Ranks

if TYPE_CHECKING:  # pydantic's models take a while to define, and most commands need none
    from cnn2gnn_dist.config import Config

_log = logging.getLogger(__name__)


def arguments(parser: argparse.ArgumentParser, stages: list[str] | None) -> None:
    """Add the options of ``cnn2gnn run``, or of the command that runs these stages only."""
    parser.add_argument(
        "--config",
        metavar="FILE_OR_PRESET",
        default="demo",
        help=f"YAML file or preset ({', '.join(presets.names())}); default demo",
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
        help="like --update, but training resumes from its checkpoint under the new config",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="see `cnn2gnn config`; text is taken as typed, null means none; the last override "
        "of a field wins",
    )
    parser.set_defaults(command=run, stages=stages, resumes=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the stages of the parsed command; returns the exit code."""
    from cnn2gnn_dist import settings
    from cnn2gnn_dist.pipeline import runner

    config = settings.load(arguments.config, arguments.overrides, _log.warning)
    _warn_if_run_moved(arguments.config, config)
    if arguments.dry_run:
        _print_plan(config, arguments.stages)
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


def _print_plan(config: Config, stages: list[str] | None) -> None:
    from cnn2gnn_dist import consistency, settings
    from cnn2gnn_dist.pipeline import keys, runner, stored
    from cnn2gnn_dist.unused_fields import Surroundings

    log.output(settings.as_yaml(config))
    with stored.looked_at(config) as (seen, lines):
        steps = runner.plan(seen, stages)
        root = Path(str(config.run.dir))
        late = [runner.checksums_note(seen, steps), runner.forgotten_note(seen, steps, root)]
    for line in lines:
        log.output(line)
    for step in steps:
        log.output(f"{step.stage.name:10} {step.status.value:12} {step.why}")
    deepspeed = keys.read_deepspeed(config)
    surroundings = Surroundings(config.device == "cuda", deepspeed=deepspeed)
    for note in [*consistency.notes(config, surroundings), *filter(None, late)]:
        log.output(f"note: {note}")
    runner.check_remaining(config, steps, config.run.ranks, deepspeed)


def _on_ray(config: Config, stages: list[str] | None, update: bool, force: bool) -> None:
    """Run all ranks as Ray actors, here or on the cluster at ``cluster.address``."""
    from cnn2gnn_dist import settings
    from cnn2gnn_dist.pipeline import keys, runner, stage_run
    from cnn2gnn_dist.runtime.group import rendezvous
    from cnn2gnn_dist.runtime.ray import cluster as ray_cluster
    from cnn2gnn_dist.runtime.ray import group as ray_group

    cluster, ranks = config.cluster, config.run.ranks
    if not (cluster.address or os.environ.get("RAY_ADDRESS")):
        # The ranks will run on this host, so their checks can be made before Ray is started.
        on_gpu = runner.choose_device(config.device) == "cuda"
        rendezvous.check_interfaces("nccl" if on_gpu else "gloo")
    with ray_cluster.running(cluster.address, ranks, logs=Path(str(config.run.dir)) / "ray-logs"):
        on_gpu = _on_gpu(config, ray_cluster.gpus())
        spec = ray_group.GroupSpec(
            ranks,
            cluster.cpus_per_rank,
            float(on_gpu),
            cluster.max_failures,
            cluster.grace_s,
            strategy=cluster.strategy,
            ranks_per_node=cluster.ranks_per_node,
            resources=cluster.rank_resources,
            wait_s=cluster.wait_s,
            fewer=_fewer(config, stages),
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
            stage_run.log_skipped(name)


def _on_gpu(config: Config, gpus: int) -> bool:
    """Whether ranks get GPUs, of which the cluster has this many.

    Raises:
        UserError: they must, and there are too few.
    """
    ranks = config.run.ranks
    if config.device == "cuda" and gpus < ranks:
        raise UserError(
            f"the config asks for {ranks} GPUs, but Ray has {gpus}",
            where="device",
            remedy="device=cpu, device=auto, or fewer ranks: run.ranks=…",
        )
    if config.device == "auto" and 0 < gpus < ranks:
        _log.warning(
            f"device=auto: {ranks} ranks train on CPUs, because the cluster has only {gpus} GPUs "
            f"(run.ranks={gpus} uses them)"
        )
    return config.device != "cpu" and gpus >= ranks


def _fewer(config: Config, stages: list[str] | None) -> list[int]:
    """World sizes with which the run could continue if hosts are lost, largest first."""
    from cnn2gnn_dist.pipeline.registry import stages_of
    from cnn2gnn_dist.stages.shared import preflight

    cluster, ranks = config.cluster, config.run.ranks
    names = stages or [stage.name for stage in stages_of(config)]
    found = []
    for world_size in range(ranks - 1, (cluster.min_ranks or ranks) - 1, -1):
        if world_size % (cluster.ranks_per_node or 1):
            continue
        with contextlib.suppress(UserError):  # the batch can't be divided among this many ranks
            preflight.check(config, names, world_size)
            found.append(world_size)
    return found


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
    report, stored = root / "report.html", config.run.storage
    if stored is not None and not (root / "results.json").is_file():  # rank 0 ran on another host
        log.output(f"results  {stored}")
        return
    if not (root / "results.json").is_file():
        raise UserError(
            "the results are complete, but this file of them is gone",
            where=str(root / "results.json"),
            remedy=f"remove {root / 'evaluation'} and repeat the command, which evaluates again",
        )
    log.output("\n" + table(json.loads((root / "results.json").read_text(encoding="utf-8"))))
    log.output(f"\nresults  {root / 'results.json'}")
    if report.exists():
        log.output(f"look     {report}")
    if stored is not None and not (root / "model" / "config.json").is_file():
        log.output(f"predict  cnn2gnn predict --model {log.quoted(stored)} IMAGE…")
        log.output(f"model    cnn2gnn export {log.quoted(stored)} --to MODEL")
        return
    log.output(f"model    {root / 'model'}")
    log.output(f"predict  cnn2gnn predict --model {log.quoted(root)} IMAGE…")
    log.output(f"serve    cnn2gnn serve {log.quoted(root)}")
    log.output(f"audit    cnn2gnn audit {log.quoted(root)}")
    if config.data.source == "digits":
        log.output("next     cnn2gnn run --config cifar10, or your own images: cnn2gnn init FOLDER")
    else:
        log.output(
            f"next     cnn2gnn evaluate --model {log.quoted(root)} IMAGES…, on other labeled images"
        )
