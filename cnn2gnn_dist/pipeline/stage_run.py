"""One stage of a run: inspect it, prepare its folder, run it unless it is complete, and record it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cnn2gnn_dist import durable, ledger, log, settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline import across_hosts, keys, moved_data
from cnn2gnn_dist.pipeline.keys import Survey
from cnn2gnn_dist.pipeline.planning import Step, flat, inspect_stage, made_anew
from cnn2gnn_dist.pipeline.registry import Stage
from cnn2gnn_dist.pipeline.stored import Stored
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.runtime.shared_files import host_folders
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder

_log = logging.getLogger(__name__)

MADE = "made"
"""Why a stage is complete if it was run just now."""


@dataclass(frozen=True)
class Run:
    """How stages are run, the same for all of them; ``runner.run_rank`` says what its arguments mean.

    ``bfloat16``: whether all ranks' devices have it. ``brought``: what hosts with folders of their own have
    got from each other as a stage's inputs.
    """

    survey: Survey
    stored: Stored
    ranks: Ranks
    device: str
    inside_ray: bool
    update: bool
    force: bool
    bfloat16: bool = True
    brought: set[str] = field(default_factory=set)

    @property
    def root(self) -> Path:
        """The run's folder."""
        return Path(str(self.survey.config.run.dir))

    def context(self, step: Step) -> Context:
        """The context for the stage of a step."""
        return Context(
            self.survey.config,
            self.ranks,
            RunPaths(self.root),
            self.root / step.stage.folder,
            str(step.key),
            self.device,
            self.inside_ray,
            about=flat(step.parts),
            force=self.force,
            deepspeed=self.survey.deepspeed,
            storage=self.stored.storage,
            bfloat16=self.bfloat16,
        )

    def record_config(self) -> None:
        """Write the config to the run's folder, on each host that has its own."""
        text = settings.as_yaml(self.survey.config)
        host_folders.in_each(partial(ledger.record_config, self.root, text))


def inspect(
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


def complete(
    run: Run, step: Step, stages: list[Stage], made: dict[str, str], look: Callable[[], Step]
) -> Step:
    """Run the stage of a step unless it is complete; return the step as it is afterwards.

    Args:
        run: how.
        step: as ``look`` has found it.
        stages: of the run.
        made: keys of the complete stages before it.
        look: determines the state of the stage (rank 0).
    """
    if step.status is Status.COMPLETE:
        if run.ranks.is_first and not run.inside_ray:
            log_skipped(step.stage.name)
        return step
    step = on_rank_0(run.ranks, partial(_fetched, run, step, stages, look))
    prepare = partial(prepare_folder, run.survey, step, run.update, run.force, run.stored)
    step = on_rank_0(run.ranks, prepare)
    run.record_config()
    if host_folders.are_separate() and not step.stage.alone:
        folders = [s.folder for s in stages if run.stored.is_input(s, step.stage)]
        across_hosts.bring_inputs(run.root, folders, run.brought)
        host_folders.in_each(lambda: (run.root / step.stage.folder).mkdir(exist_ok=True))
    return _execute(run.context(step), run.survey, step, dict(made))


def _fetched(run: Run, step: Step, stages: list[Stage], look: Callable[[], Step]) -> Step:
    """The step once the storage's files that the stage builds on are here: some keys depend on what is in them."""
    run.stored.before(step, stages, run.force)
    if run.stored.storage is None:
        return step
    again = look()
    return step if again.key == step.key else again


def log_skipped(name: str) -> None:
    """Log that a stage is complete; under Ray the driver does, whose log lines can't get lost."""
    _log.info("complete, skipped", extra={"stage": name})


def _execute(context: Context, survey: Survey, step: Step, made: dict[str, str]) -> Step:
    with log.stage(step.stage.name):
        return _executed(context, survey, step, made)


def _executed(context: Context, survey: Survey, step: Step, made: dict[str, str]) -> Step:
    stage, ranks = step.stage, context.ranks
    began = time.perf_counter()
    context.say(f"{step.status.value}: {step.why}")
    _log.debug("key %s, folder %s", context.key, context.folder)

    def work() -> list[Path]:
        with durable.disk_full_reported(context.folder, resumes=True):
            return stage.work(context, made)

    files = on_rank_0(ranks, work) if stage.alone else work()

    def close() -> Step:
        with durable.disk_full_reported(context.folder, resumes=True):
            return recorded()

    def recorded() -> Step:
        seconds = time.perf_counter() - began
        for path in files if stage.trains else ():
            if path.name == checkpoint_folder.MANIFEST:  # a training may have been resumed
                seconds = max(seconds, checkpoint_folder.seconds_of(path.parent))
        entry = step.record(
            digest=keys.digest(survey, stage, context.key, files),
            outputs=ledger.outputs(context.folder, files),
            seconds=round(seconds, 1),
        )
        ledger.finish(context.folder, entry)
        _log.info(f"done in {entry.seconds:.0f} s")
        return replace(step, status=Status.COMPLETE, why=MADE, entry=entry)

    return on_rank_0(ranks, close)


def prepare_folder(
    survey: Survey, step: Step, update: bool, force: bool, stored: Stored | None = None
) -> Step:
    """Mark the stage's folder as begun; refuse a stale one, set it aside, or resume it."""
    root, stage = Path(str(survey.config.run.dir)), step.stage
    folder, edits = root / stage.folder, ""
    if step.key is None:
        raise UserError(
            f"the stage {stage.name} {step.why}",
            where=str(root),
            remedy="run the earlier stages first, or all: `cnn2gnn run"
            + " --update" * update
            + "`",
        )
    anew = made_anew(survey, step)  # while the record is in the folder
    # A teacher that is not trained has nothing to resume: its checkpoint would pass for the weights given now.
    resumes = stage.trains and (stage.name != "teacher" or survey.config.teacher.epochs > 0)
    if step.status is Status.STALE and force and resumes:
        _warn_of_force(step, folder)
    elif (
        step.status is Status.STALE
        or (update and _of_another_config(step, folder))
        or (edits := _edits(step, root))
    ):
        if not (update or force):
            raise UserError(
                f"the stage {stage.name} in this folder was {step.why}"
                if not edits
                else f"the stage {stage.name} is {step.why}; written anew, it would lose its edits: {edits}",
                where=str(folder),
                remedy="another run.dir=…, or --update: the old results are kept next to the new"
                + ("; or --force: training resumes from its checkpoint" * resumes),
            )
        with nullcontext() if stage.held is None else stage.held(root):
            if stored is not None:
                stored.set_aside(stage)
            aside = ledger.set_aside(folder)
        _log.info(f"old results moved to {aside.name}", extra={"stage": stage.name})
        step = replace(step, status=Status.FRESH)
    if step.status is not Status.RESUME:
        step = replace(anew, status=step.status)
    ledger.begin(folder, step.record())
    if survey.inputs(stage):
        survey.keep()
    return step


def _warn_of_force(step: Step, folder: Path) -> None:
    """Say what a training that goes on under another config keeps of the earlier one."""
    notes = [f"resuming anyway: {step.why}"]
    if step.entry and step.entry.inputs.get("index") != step.inputs.get("index"):
        notes.append(
            "it may have been trained on held-out images, which would inflate its accuracy; "
            "--update retrains it"
        )
    before = ledger.finished(folder)
    epochs = f"{'teacher' if step.stage.name == 'teacher' else 'student'}.epochs"
    if before is not None and keys.parts_of(before).get(epochs, 0) >= step.parts[epochs]:
        notes.append(
            "it is finished, so that no step is trained with what has changed; --update retrains it"
        )
    for note in notes:
        _log.warning(note, extra={"stage": step.stage.name})


def _edits(step: Step, root: Path) -> str:
    """What users have changed in an unfinished stage's folder; a stage that runs again would overwrite it."""
    edits = step.stage.edits
    return edits(root) if edits is not None and step.status is Status.RESUME else ""


def _of_another_config(step: Step, folder: Path) -> bool:
    """Whether a training started under this key would resume from a checkpoint of another key.

    That is the case after ``--force`` has taken one over, until it is saved again.
    """
    if step.status is not Status.RESUME or not step.stage.trains:
        return False
    for path in reversed(checkpoint_folder.all_of(checkpoint_folder.root_of(folder))):
        with suppress(UserError):  # damaged: training resumes from the one before
            return bool(checkpoint_folder.read_state(path)["run_id"] != step.key)
    return False


def on_rank_0(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Rank 0 does the work, however long it takes; all ranks get its result or raise its error."""
    from cnn2gnn_dist.runtime.group import collectives

    return collectives.alone(work)
