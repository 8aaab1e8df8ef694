"""Which stage comes next, and why: keys, skips, order; called identically on every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cnn2gnn_dist import consistency, ledger, settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import PeerLost, Preempted, UserError, first_line
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline import across_hosts, keys
from cnn2gnn_dist.pipeline.keys import Survey
from cnn2gnn_dist.pipeline.planning import Step, check_names, flat, plan
from cnn2gnn_dist.pipeline.registry import Stage, stages_of
from cnn2gnn_dist.pipeline.stage_run import MADE, Run, complete, inspect, on_rank_0
from cnn2gnn_dist.pipeline.stored import Stored
from cnn2gnn_dist.runtime import preemption
from cnn2gnn_dist.runtime.group import exchange
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.runtime.shared_files import folder_lock, host_folders
from cnn2gnn_dist.stages.shared import preflight
from cnn2gnn_dist.stages.shared.context import RunPaths, load_manifest
from cnn2gnn_dist.unused_fields import Surroundings

_log = logging.getLogger(__name__)

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
        UserError: on every rank, even if rank 0 raised it in a stage that it runs alone.
        PeerLost: another rank died, or did not answer within ``cluster.timeout_s``.
        PeerFailed: another rank raised something else than these.
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
            errors = _joined(ranks, device, config, about, problem)
        elif problem is not None:
            raise problem
        across_hosts.check_hosts(config, device)
        bfloat16 = across_hosts.bfloat16_everywhere(config, device)
        with _locked(Path(str(config.run.dir)), config.cluster.timeout_s):
            read = on_rank_0(ranks, lambda: deepspeed or keys.read_deepspeed(config))
            surroundings = Surroundings(device == "cuda", inside_ray, ranks.world_size, read)
            survey = Survey(config, read, reads=True, recheck=update)
            stored = _opened(survey, names, surroundings, ranks)
            run = Run(survey, stored, ranks, device, inside_ray, update, force, bfloat16)
            return _run_all(run, names)
    except UserError as error:
        _tell_others(error, errors, stays=ranks.world_size > 1 and not inside_ray)
        raise
    except Exception as error:
        lost = isinstance(error, RuntimeError) and collectives.lost_peer(error)
        if ranks.world_size > 1 and lost:
            raise errors.received() or _peer_lost(error, config, errors.silent()) from error
        errors.publish_bug(error)
        raise
    finally:
        errors.close()
        engine.shutdown()
        host_folders.end()


def _joined(
    ranks: Ranks, device: str, config: Config, about: dict[str, Any], problem: UserError | None
) -> exchange.ErrorExchange:
    """Join the group; return what passes this rank's errors on to it (collective)."""
    from cnn2gnn_dist.training import engine

    engine.init(ranks, device, config.cluster.timeout_s, about, problem)
    errors = exchange.ErrorExchange()
    engine.explain_lost_peers(errors.received)
    return errors


def _opened(
    survey: Survey, names: list[str] | None, surroundings: Surroundings, ranks: Ranks
) -> Stored:
    """The run's storage, if it has one, once the run may begin in every folder (collective)."""
    config = survey.config
    stored = Stored(config)
    stored.open()
    on_rank_0(ranks, lambda: _begin(survey, names, surroundings, stored))
    if host_folders.are_separate():
        root, text = Path(str(config.run.dir)), settings.as_yaml(config)
        host_folders.in_each(lambda: ledger.claim(root, text))
    return stored


def _tell_others(error: UserError, errors: exchange.ErrorExchange, stays: bool) -> None:
    """Publish this rank's error; ``stays``: until that is done, another rank's exit doesn't stop this process."""
    if stays:
        preemption.ignore_stop()  # whoever reports the error may not be the first to end
        if error.shared or isinstance(error, Preempted):
            errors.let_rank_0_report()
    error.shared = errors.publish(error)


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
    """The device; or why this rank has none, to pass on to the other ranks."""
    try:
        return choose_device(config.device), None
    except UserError as error:
        return "cpu", error


def _run_all(run: Run, names: list[str] | None) -> dict[str, Any]:
    """Run the named stages in order; return why each is complete."""
    survey, stages = run.survey, stages_of(run.survey.config)
    check_names(stages, names)
    digests: dict[str, str] = {}
    made: dict[str, str] = {}
    done: dict[str, Any] = {}
    blocked = ""
    for stage in stages:
        wanted = names is None or stage.name in names
        look = partial(inspect, survey, stage, stages, digests, run.update and wanted)
        step = on_rank_0(run.ranks, look)
        if step.key is None and blocked:
            step = replace(step, why=f"{step.why} ({blocked})")
        if wanted:
            step = complete(run, step, stages, made, look)
            done[stage.name] = step.why
        if step.status is Status.COMPLETE:
            if not host_folders.are_separate() and not across_hosts.ends_here(stage, stages):
                across_hosts.hand_over(run.root / stage.folder, step)
            run.stored.after(step, made=step.why == MADE)
        if step.status is Status.COMPLETE and step.entry:
            digests[stage.name], made[stage.name] = step.entry.digest, step.entry.key
        else:
            blocked = blocked or f"{stage.name}: {step.why}"
        if stage.name == "index" and step.status is Status.COMPLETE:
            across_hosts.bring_inputs(run.root, [stage.folder], run.brought)
            across_hosts.check_shards(RunPaths(run.root))
            on_rank_0(run.ranks, lambda: _check_image_count(survey, names))
    if names is None:  # nothing was refused: readers of the folder find the current config
        run.record_config()
    run.stored.end()
    return done


def _check_image_count(survey: Survey, names: list[str] | None) -> None:
    """Check that there are enough images for the stages still to run, before any training."""
    config, steps = survey.config, plan(survey.config, names, survey)
    ahead = [step.stage.name for step in steps if step.status is not Status.COMPLETE]
    train = load_manifest(RunPaths(Path(str(config.run.dir))).train_manifest)
    preflight.check_images(config, ahead, len(train), int((train.label_N >= 0).sum()))


def _peer_lost(error: Exception, config: Config, who: str) -> PeerLost:
    return PeerLost(
        f"another rank died, or did not answer within {config.cluster.timeout_s:g} s: {who} "
        f"({first_line(error)})",
        where="cluster.timeout_s",
        remedy="check the other ranks' output; the same command resumes from the last checkpoint",
    )


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
    """A note if ``data.checksums`` comes too late, because the images were indexed without."""
    manifest = RunPaths(Path(str(config.run.dir))).train_manifest
    again = any(s.stage.name == "index" and s.status is not Status.COMPLETE for s in steps)
    if not config.data.checksums or again or not manifest.is_file():
        return None
    if load_manifest(manifest).crc_N is not None:
        return None
    return (
        "data.checksums=true comes too late: this run's images were indexed without checksums, so reads "
        "are not verified; start the run in another folder (run.dir=…) to verify them"
    )


def forgotten_note(config: Config, steps: list[Step], named: Path | None = None) -> str | None:
    """A note if a training is to go on, or begin, with images that the memory of the run's model has forgotten.

    ``named``: the run's folder as the user knows it, if the config is of a view of it (``stored.looked_at``).
    """
    trains = any(s.stage.trains and s.status is not Status.COMPLETE for s in steps)
    if not trains or not any("index" in step.inputs for step in steps):
        return None  # an index that is yet to be made leaves them out
    from cnn2gnn_dist.stages import earlier_models

    return earlier_models.forgotten_note(Path(str(config.run.dir)), config.data.relabel, named)


def _begin(
    survey: Survey, names: list[str] | None, surroundings: Surroundings, stored: Stored
) -> None:
    config = survey.config
    steps = plan(config, names, survey)
    ahead = check_remaining(config, steps, surroundings.ranks or config.run.ranks, survey.deepspeed)
    for late in (checksums_note(config, steps), forgotten_note(config, steps)):
        if late:
            _log.warning(late)
    if any(stage.trains for stage in ahead):
        for note in consistency.notes(config, surroundings):
            _log.warning(note)
    ledger.claim(Path(str(config.run.dir)), settings.as_yaml(config))
    stored.begin(ahead)


@contextmanager
def _locked(root: Path, timeout_s: float = 600.0) -> Iterator[None]:
    """Keep a second run out of each folder; the rank that acts for it holds the lock, which ends with it.

    Raises:
        UserError: on every rank: another process holds it.
    """
    held: list[folder_lock.Release] = []
    # The others wait in a collective, whose timeout must exceed ours.
    seconds = min(LOCK_SECONDS, timeout_s / 2)
    try:
        host_folders.in_each(lambda: held.append(folder_lock.take(root, seconds)))
        yield
    finally:
        for release in held:
            release()
