"""Which stage comes next, and why: keys, skips, order; called identically on every rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cnn2gnn_dist import consistency, ledger, log, settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import PeerLost, UserError, first_line
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline import across_hosts, keys, moved_data
from cnn2gnn_dist.pipeline.keys import Survey
from cnn2gnn_dist.pipeline.planning import Step, check_names, flat, inspect_stage, plan
from cnn2gnn_dist.pipeline.registry import Stage, stages_of
from cnn2gnn_dist.pipeline.stored import Stored
from cnn2gnn_dist.runtime import preemption
from cnn2gnn_dist.runtime.group import exchange
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.runtime.shared_files import folder_lock
from cnn2gnn_dist.stages.shared import preflight
from cnn2gnn_dist.stages.shared.context import Context, RunPaths, load_manifest
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder
from cnn2gnn_dist.unused_fields import Surroundings

_log = logging.getLogger(__name__)

MADE = "made"
"""Why a stage is complete that was run now."""
LOCK_SECONDS = 10.0
"""Seconds that a run that was killed or asked to stop may need to release its folder."""


def run_rank(
    tree: dict[str, Any],
    names: list[str] | None,
    update: bool,
    inside_ray: bool,
    ranks: Ranks,
    force: bool = False,
    deepspeed: keys.DeepSpeed | None = None,
) -> dict[str, Any]:
    """Run the stages that are not complete; every rank calls this with the same arguments.

    Args:
        tree: the resolved config as plain data.
        names: stages to run; None for all.
        update: set stale results aside and recompute them, instead of refusing.
        inside_ray: this process runs under Ray.
        ranks: this process's rank and group.
        force: like ``update``, but training resumes from its checkpoint under the new config.
        deepspeed: the DeepSpeed configs as the driver read them; None: rank 0 reads them.

    Raises:
        UserError: on every rank, even if rank 0 met it in a stage that it runs alone.
        PeerLost: another rank died, or did not answer within ``cluster.timeout_s``.
        Preempted: training was asked to stop, and has saved.
        RuntimeError: torch's or ours: a bug.
    """
    from cnn2gnn_dist.runtime.group import collectives
    from cnn2gnn_dist.training import engine

    config = settings.check(tree)
    device, problem = _device_or_problem(config)
    errors = exchange.ErrorExchange()
    try:
        if ranks.world_size > 1 or not needs_no_group(config, names):
            about = flat(tree) | {"stages": names, "update": update, "force": force}
            engine.init(ranks, device, config.cluster.timeout_s, about, problem)
            errors = exchange.ErrorExchange()
        elif problem is not None:
            raise problem
        across_hosts.check_hosts(config, device)
        with _locked(Path(str(config.run.dir)), ranks, config.cluster.timeout_s):
            read = _on_rank_0(ranks, lambda: deepspeed or keys.read_deepspeed(config))
            surroundings = Surroundings(device == "cuda", inside_ray, ranks.world_size, read)
            survey = Survey(config, read, reads=True, recheck=update)
            stored = Stored(config)
            stored.open()
            _on_rank_0(ranks, lambda: _begin(survey, names, surroundings, stored))
            return _run_all(survey, names, update, inside_ray, ranks, device, force, stored)
    except UserError as error:
        if ranks.world_size > 1 and not inside_ray:
            preemption.ignore_stop()  # whoever reports the error may not be the first to end
        error.shared = errors.publish(error)
        raise
    except RuntimeError as error:
        if ranks.world_size > 1 and collectives.lost_peer(error):
            raise errors.received() or _peer_lost(error, config, errors.silent()) from error
        raise
    finally:
        errors.close()
        engine.shutdown()


def needs_no_group(config: Config, names: list[str] | None) -> bool:
    """Whether rank 0 runs these stages alone, without a process group."""
    return all(stage.alone for stage in stages_of(config) if names is None or stage.name in names)


def choose_device(wanted: str) -> str:
    """Return the device to use, "cpu" or "cuda".

    Raises:
        UserError: cuda is requested and not available.
    """
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError(
            "the config asks for a GPU, but torch finds none",
            where="device",
            remedy="device=cpu or device=auto; `cnn2gnn doctor` shows what torch sees",
        )
    return "cuda" if wanted == "cuda" or (wanted == "auto" and there) else "cpu"


def _device_or_problem(config: Config) -> tuple[str, UserError | None]:
    """The device; or why this rank has none, for the other ranks to hear."""
    try:
        return choose_device(config.device), None
    except UserError as error:
        return "cpu", error


def _run_all(
    survey: Survey,
    names: list[str] | None,
    update: bool,
    inside_ray: bool,
    ranks: Ranks,
    device: str,
    force: bool,
    stored: Stored,
) -> dict[str, Any]:
    config, stages = survey.config, stages_of(survey.config)
    root = Path(str(config.run.dir))
    check_names(stages, names)
    digests: dict[str, str] = {}
    made: dict[str, str] = {}
    done: dict[str, Any] = {}
    blocked = ""
    for stage in stages:
        wanted = names is None or stage.name in names
        step = _on_rank_0(
            ranks, partial(_inspect, survey, stage, stages, digests, update and wanted)
        )
        if step.key is None and blocked:
            step = replace(step, why=f"{step.why} ({blocked})")
        if step.status is not Status.COMPLETE and wanted:
            _on_rank_0(ranks, partial(stored.before, step, stages, force))
            step = _on_rank_0(ranks, partial(_prepare_folder, survey, step, update, force, stored))
            _on_rank_0(ranks, partial(ledger.record_config, root, settings.as_yaml(config)))
            context = Context(
                config,
                ranks,
                RunPaths(root),
                root / stage.folder,
                str(step.key),
                device,
                inside_ray,
                about=flat(step.parts),
                force=force,
                deepspeed=survey.deepspeed,
                storage=stored.storage,
            )
            step = _execute(context, survey, step, dict(made))
        elif wanted and ranks.is_first and not inside_ray:
            log_skipped(stage.name)
        if step.status is Status.COMPLETE and not across_hosts.ends_here(stage, stages):
            across_hosts.hand_over(root / stage.folder, step)
        if step.status is Status.COMPLETE:
            stored.after(step, made=step.why == MADE)
        if step.status is Status.COMPLETE and step.entry:
            digests[stage.name], made[stage.name] = step.entry.digest, step.entry.key
        else:
            blocked = blocked or f"{stage.name}: {step.why}"
        if wanted:
            done[stage.name] = step.why
        if stage.name == "index" and step.status is Status.COMPLETE:
            across_hosts.check_shards(RunPaths(root))
            _on_rank_0(ranks, lambda: _check_image_count(survey, names))
    if names is None:  # nothing was refused: readers of the folder find the current config
        _on_rank_0(ranks, partial(ledger.record_config, root, settings.as_yaml(config)))
    stored.end()
    return done


def _check_image_count(survey: Survey, names: list[str] | None) -> None:
    """Check that there are enough images for the stages still to run, before any training is paid for."""
    config, steps = survey.config, plan(survey.config, names, survey)
    ahead = [step.stage.name for step in steps if step.status is not Status.COMPLETE]
    train = load_manifest(RunPaths(Path(str(config.run.dir))).train_manifest)
    preflight.check_images(config, ahead, len(train))


def _inspect(
    survey: Survey, stage: Stage, stages: list[Stage], digests: dict[str, str], update: bool
) -> Step:
    """Determine the state of a stage (rank 0).

    For a complete stage, records and paths follow the files: touched ones are recorded again, and
    manifests are updated for shards that have moved.
    """
    step = inspect_stage(survey, stage, stages, digests)
    if step.status is not Status.COMPLETE or step.entry is None:
        return step
    if update and survey.inputs(stage) and survey.untagged():
        why = "its store can't tell whether files have changed, so they are read again"
        return replace(step, status=Status.STALE, why=why)
    if survey.inputs(stage):
        survey.keep()
    if stage.name == "index":
        root = Path(str(survey.config.run.dir))
        entry = moved_data.follow(survey.config, RunPaths(root), step.entry)
        step = replace(step, entry=entry)
    return step


def log_skipped(name: str) -> None:
    """Log that a stage is complete; under Ray the driver does, since its log lines are not lost."""
    _log.info("complete, skipped", extra={"stage": name})


def _execute(context: Context, survey: Survey, step: Step, made: dict[str, str]) -> Step:
    with log.stage(step.stage.name):
        return _executed(context, survey, step, made)


def _executed(context: Context, survey: Survey, step: Step, made: dict[str, str]) -> Step:
    stage, ranks = step.stage, context.ranks
    began = time.perf_counter()
    context.say(f"{step.status.value}: {step.why}")
    _log.debug("key %s, folder %s", context.key, context.folder)
    if stage.alone:
        files = _on_rank_0(ranks, lambda: stage.work(context, made))
    else:
        files = stage.work(context, made)

    def close() -> Step:
        entry = step.record(
            digest=keys.digest(survey, stage, context.key, files),
            outputs=ledger.outputs(context.folder, files),
            seconds=round(time.perf_counter() - began, 1),
        )
        ledger.finish(context.folder, entry)
        _log.info(f"done in {entry.seconds:.0f} s")
        return replace(step, status=Status.COMPLETE, why=MADE, entry=entry)

    return _on_rank_0(ranks, close)


def _peer_lost(error: RuntimeError, config: Config, who: str) -> PeerLost:
    return PeerLost(
        f"another rank died, or did not answer within {config.cluster.timeout_s:g} s: {who} "
        f"({first_line(error)})",
        where="cluster.timeout_s",
        remedy="check the other ranks' output; the same command resumes from the last checkpoint",
    )


def _prepare_folder(
    survey: Survey, step: Step, update: bool, force: bool, stored: Stored | None = None
) -> Step:
    """Mark the stage's folder as begun; refuse a stale one, set it aside, or resume it."""
    root, stage, key = Path(str(survey.config.run.dir)), step.stage, step.key
    folder = root / stage.folder
    if key is None:
        raise UserError(
            f"the stage {stage.name} {step.why}",
            where=str(root),
            remedy="run the earlier stages first, or all: `cnn2gnn run"
            + " --update" * update
            + "`",
        )
    if step.status is Status.STALE and force and stage.trains:
        _log.warning(f"resuming anyway: {step.why}", extra={"stage": stage.name})
        if step.entry and step.entry.inputs.get("index") != step.inputs.get("index"):
            _log.warning(
                "it may have been trained on held-out images, which would inflate its accuracy; "
                "--update retrains it",
                extra={"stage": stage.name},
            )
    elif step.status is Status.STALE or (update and _of_another_config(step, folder)):
        if not (update or force):
            raise UserError(
                f"the stage {stage.name} in this folder was {step.why}",
                where=str(folder),
                remedy="another run.dir=…, or --update: the old results are kept beside the new"
                + ("; or --force: training resumes from its checkpoint" * stage.trains),
            )
        if stored is not None:
            stored.set_aside(stage)
        aside = ledger.set_aside(folder)
        _log.info(f"old results moved to {aside.name}", extra={"stage": stage.name})
        step = replace(step, status=Status.FRESH)
    ledger.begin(folder, step.record())
    if survey.inputs(stage):
        survey.keep()
    return step


def _of_another_config(step: Step, folder: Path) -> bool:
    """Whether a training started under this key would resume from a checkpoint of another key.

    That is one that ``--force`` took over and that has not been saved again since.
    """
    if step.status is not Status.RESUME or not step.stage.trains:
        return False
    found = checkpoint_folder.all_of(checkpoint_folder.root_of(folder))
    return bool(found) and checkpoint_folder.read_state(found[-1])["run_id"] != step.key


def check_remaining(
    config: Config, steps: list[Step], world_size: int, deepspeed: keys.DeepSpeed | None = None
) -> list[Stage]:
    """Return the stages still to run, after checking that none would be refused when it begins.

    ``deepspeed``: the DeepSpeed configs; None: they are read here.

    Raises:
        UserError: settings that don't fit together; the folder contains something else.
    """
    ahead = [step.stage for step in steps if step.status is not Status.COMPLETE]
    read = keys.read_deepspeed(config) if deepspeed is None else deepspeed
    preflight.check(config, [stage.name for stage in ahead], world_size, read)
    ledger.check_claim(Path(str(config.run.dir)))
    return ahead


def checksums_note(config: Config, steps: list[Step]) -> str | None:
    """Say so if ``data.checksums`` comes too late: the images were indexed without."""
    manifest = RunPaths(Path(str(config.run.dir))).train_manifest
    again = any(s.stage.name == "index" and s.status is not Status.COMPLETE for s in steps)
    if not config.data.checksums or again or not manifest.is_file():
        return None
    if load_manifest(manifest).crc_N is not None:
        return None
    return (
        "data.checksums=true comes too late: the images of this run were indexed without, and what is "
        "read is not verified; make the run in another folder (run.dir=…) for that"
    )


def _begin(
    survey: Survey, names: list[str] | None, surroundings: Surroundings, stored: Stored
) -> None:
    config = survey.config
    steps = plan(config, names, survey)
    ahead = check_remaining(config, steps, surroundings.ranks or config.run.ranks, survey.deepspeed)
    if note := checksums_note(config, steps):
        _log.warning(note)
    if any(stage.trains for stage in ahead):
        for note in consistency.notes(config, surroundings):
            _log.warning(note)
    ledger.claim(Path(str(config.run.dir)), settings.as_yaml(config))
    stored.begin(ahead)


@contextmanager
def _locked(root: Path, ranks: Ranks, timeout_s: float = 600.0) -> Iterator[None]:
    """Keep a second run out of the folder; rank 0 holds the lock, which ends with it.

    Raises:
        UserError: on every rank: another process holds it.
    """
    held: list[folder_lock.Release] = []
    # The others wait in a collective, whose timeout must exceed ours.
    seconds = min(LOCK_SECONDS, timeout_s / 2)
    try:
        _on_rank_0(ranks, lambda: held.append(folder_lock.take(root, seconds)))
        yield
    finally:
        for release in held:
            release()


def _on_rank_0(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Rank 0 does the work, however long it takes; all ranks get its result or raise its error."""
    from cnn2gnn_dist.runtime.group import collectives

    return collectives.alone(work)
