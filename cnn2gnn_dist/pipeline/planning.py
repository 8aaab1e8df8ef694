"""The state of each stage of a run on disk: complete, to resume, to run, or stale; and why."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cnn2gnn_dist import ledger
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Entry, Status
from cnn2gnn_dist.pipeline import keys
from cnn2gnn_dist.pipeline.keys import Survey
from cnn2gnn_dist.pipeline.registry import Stage, stages_of
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder


@dataclass(frozen=True)
class Step:
    """A stage in a plan: what will happen to it, and why. ``key`` is None while inputs are missing.

    The key is derived from ``parts`` and ``inputs`` according to ``schema``: a stage started under an
    older schema is finished under it.
    """

    stage: Stage
    key: str | None
    status: Status
    why: str
    entry: Entry | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    schema: int = ledger.SCHEMA

    def record(self, **made: Any) -> Entry:
        """The contents of this step's ``begin.json``, or of its ``done.json`` with what was ``made``."""
        return Entry(str(self.key), self.parts, inputs=self.inputs, schema=self.schema, **made)


def plan(
    config: Config, names: list[str] | None = None, survey: Survey | None = None
) -> list[Step]:
    """Determine what would be skipped, continued or run, without doing anything.

    Raises:
        UserError: an unknown stage; data or a DeepSpeed config is missing.
    """
    survey, stages = survey or Survey(config, keys.read_deepspeed(config)), stages_of(config)
    check_names(stages, names)
    digests: dict[str, str] = {}
    steps = []
    for stage in stages:
        step = inspect_stage(survey, stage, stages, digests)
        if step.status is Status.COMPLETE and step.entry:
            digests[stage.name] = step.entry.digest
        if names is None or stage.name in names:
            steps.append(step)
    return steps


def inspect_stage(
    survey: Survey, stage: Stage, stages: list[Stage], digests: dict[str, str]
) -> Step:
    """Determine the state of one stage; ``digests``: of the complete stages before it."""
    folder = Path(str(survey.config.run.dir)) / stage.folder
    there = {s.name for s in stages}
    needs = [need for need in stage.needs if need in there]
    missing = [need for need in needs if need not in digests]
    if missing:
        return Step(stage, None, Status.FRESH, f"waits for {', '.join(missing)}")
    inputs = {need: digests[need] for need in needs} | survey.inputs(stage)
    before, recorded = ledger.finished(folder), ledger.recorded(folder)
    parts = keys.parts(survey.config, stage, survey.deepspeed, before, recorded)
    key, schema = keys.key_of(stage, parts, inputs), ledger.SCHEMA
    if recorded and recorded.schema < schema and keys.matches(recorded, stage, parts, inputs):
        key, parts, schema = recorded.key, recorded.parts, recorded.schema
    status, entry = ledger.status(folder, key)
    why = {
        Status.FRESH: "not started yet",
        Status.RESUME: "started but not finished",
        Status.COMPLETE: "complete, skipped",
        Status.STALE: "made from a different config or inputs",
    }[status]
    if status is Status.STALE and entry is not None and entry.schema > ledger.SCHEMA:
        why = f"recorded by a newer version of cnn2gnn-dist (key schema {entry.schema})"
    elif status is Status.STALE and entry is not None:
        changed = keys.changes(entry, parts) + _changed_inputs(survey, entry, inputs)
        why += f": {'; '.join(changed)}" if changed else " (its inputs changed)"
    elif status is Status.RESUME and before is not None:
        why = f"no longer complete: {ledger.missing(folder, before)}"
    elif status is Status.COMPLETE and stage.trains:
        problem = _damage(survey, folder)
        if problem:
            status, why = Status.RESUME, f"no longer complete: {problem}"
    return Step(stage, key, status, why, entry, parts, inputs, schema)


def made_anew(survey: Survey, step: Step) -> Step:
    """The step with the key of a result that takes the place of what its folder has.

    What that record leaves out because it did not count then does count for the new result.
    """
    before = ledger.finished(Path(str(survey.config.run.dir)) / step.stage.folder)
    parts = keys.parts(survey.config, step.stage, survey.deepspeed, before, anew=True)
    key = keys.key_of(step.stage, parts, step.inputs)
    return replace(step, key=key, parts=parts, schema=ledger.SCHEMA)


def _damage(survey: Survey, folder: Path) -> str:
    """What is wrong with the final checkpoint of a training; empty if nothing is.

    Files that are only in the run's storage are compared with their checksums when they are fetched.
    """
    recorded = checkpoint_folder.recorded(folder)
    if recorded is None:
        return ""
    held = (folder / name for name in ledger.held(folder))
    problem = survey.damage(recorded, {path.name for path in held if path.parent == recorded})
    return f"{recorded.name}: {problem}" if problem else ""


def _changed_inputs(survey: Survey, entry: Entry, inputs: dict[str, str]) -> list[str]:
    """Describe the inputs of a stage that have changed since it was built on them."""
    found = []
    for name in sorted(entry.inputs.keys() | inputs.keys()):
        old, new = entry.inputs.get(name), inputs.get(name)
        if not entry.inputs or old == new:  # records of earlier versions don't have them
            continue
        if not name.startswith("data."):
            found.append(f"the stage {name} was rerun")
        elif old is None or new is None:
            found.append(f"{name} was {'not ' * (old is None)}set")
        else:
            how = survey.difference(name.removeprefix("data."))
            found.append(f"{name}: {how or 'different files'}")
    return found


def check_names(stages: list[Stage], names: list[str] | None) -> None:
    """Check that all names are stages.

    Raises:
        UserError: one is not.
    """
    known = [stage.name for stage in stages]
    for name in names or []:
        if name not in known:
            raise UserError(
                f"this config has no stage {name!r}",
                where="stages",
                remedy=f"its stages are {', '.join(known)}",
            )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted paths."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
