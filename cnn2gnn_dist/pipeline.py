"""Which stage comes next, and why: keys, skips, order; the same call on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cnn2gnn_dist import ledger, settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import PeerLost, UserError
from cnn2gnn_dist.ledger import Entry, Standing
from cnn2gnn_dist.runtime import folder_lock
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages import fit
from cnn2gnn_dist.stages.context import Context, RunPaths
from cnn2gnn_dist.stages.registry import EXECUTION, Stage, stages_of

LOCK_SECONDS = 10.0
"""A run that was killed or told to end may need so long to let go of its folder."""


@dataclass(frozen=True)
class Step:
    """A stage in a plan: what will happen to it, and why. ``key`` is None while inputs lack."""

    stage: Stage
    key: str | None
    standing: Standing
    why: str
    entry: Entry | None = None


def plan(config: Config, names: list[str] | None = None) -> list[Step]:
    """What would be skipped, continued or run, without doing anything.

    Raises:
        UserError: an unknown stage.
    """
    root, stages = Path(str(config.run.dir)), stages_of(config)
    _check_names(stages, names)
    digests: dict[str, str] = {}
    steps = []
    for stage in stages:
        step = _look(config, root, stage, stages, digests)
        if step.standing is Standing.WHOLE and step.entry:
            digests[stage.name] = step.entry.digest
        if names is None or stage.name in names:
            steps.append(step)
    return steps


def run_rank(
    tree: dict[str, Any],
    names: list[str] | None,
    update: bool,
    inside_ray: bool,
    ranks: Ranks,
    force: bool = False,
) -> dict[str, Any]:
    """Run the stages that are not whole; every rank calls this with the same arguments.

    Args:
        tree: the resolved config as plain data.
        names: stages to run; None for all.
        update: set stale results aside and make them again, instead of refusing.
        inside_ray: Ray carries this process.
        ranks: who we are.
        force: like ``update``, but training goes on from its checkpoint under the new config.

    Raises:
        UserError: on every rank, whatever rank met it first in a stage of rank 0 alone.
        PeerLost: another rank died, or did not answer within ``cluster.timeout_s``.
        Preempted: training was told to end, and has saved.
    """
    from cnn2gnn_dist.training import distributed, engine

    config = settings.check(tree)
    device = choose_device(config.device)
    if ranks.world_size > 1 or not light(config, names):
        engine.init(ranks, device, timeout_s=config.cluster.timeout_s)
    try:
        with _locked(Path(str(config.run.dir)), ranks, config.cluster.timeout_s):
            _together(ranks, lambda: _begin(config, names, ranks.world_size))
            return _run_all(config, names, update, inside_ray, ranks, device, force)
    except RuntimeError as error:
        if ranks.world_size > 1 and distributed.lost_peer(error):
            raise _peer_lost(error, config) from error
        raise
    finally:
        engine.shutdown()


def light(config: Config, names: list[str] | None) -> bool:
    """Whether these stages are rank 0's alone, and need no process group."""
    return all(stage.alone for stage in stages_of(config) if names is None or stage.name in names)


def choose_device(wanted: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        UserError: cuda is asked for and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError(
            "the config asks for a GPU and torch finds none",
            where="device",
            remedy="device=cpu or device=auto; `cnn2gnn doctor` says what torch sees",
        )
    return "cuda" if wanted == "cuda" or (wanted == "auto" and there) else "cpu"


def _run_all(
    config: Config,
    names: list[str] | None,
    update: bool,
    inside_ray: bool,
    ranks: Ranks,
    device: str,
    force: bool,
) -> dict[str, Any]:
    root, stages = Path(str(config.run.dir)), stages_of(config)
    _check_names(stages, names)
    digests: dict[str, str] = {}
    keys: dict[str, str] = {}
    done: dict[str, Any] = {}
    for stage in stages:
        step = _together(ranks, partial(_look, config, root, stage, stages, digests))
        wanted = names is None or stage.name in names
        if step.standing is not Standing.WHOLE and wanted:
            step = _together(ranks, partial(_make_room, config, root, step, update, force))
            context = Context(
                config,
                ranks,
                RunPaths(root),
                root / stage.folder,
                str(step.key),
                device,
                inside_ray,
                about=flat(_parts(config, stage)),
                force=force,
            )
            step = _execute(context, step, dict(keys))
        elif wanted and ranks.is_first and not inside_ray:
            print(skipped(stage.name), flush=True)
        if step.standing is Standing.WHOLE and step.entry:
            digests[stage.name], keys[stage.name] = step.entry.digest, step.entry.key
        if wanted:
            done[stage.name] = step.why
        if stage.name == "index" and step.standing is Standing.WHOLE:
            _together(ranks, lambda: _fit_images(config, names))
    return done


def _fit_images(config: Config, names: list[str] | None) -> None:
    """See that there are images enough for what lies ahead, before any training is paid for."""
    from cnn2gnn_dist.stages.context import load_manifest

    ahead = [step.stage.name for step in plan(config, names) if step.standing is not Standing.WHOLE]
    train = load_manifest(RunPaths(Path(str(config.run.dir))).train_manifest)
    fit.check_images(config, ahead, len(train))


def skipped(name: str) -> str:
    """The line about a stage that is whole; under Ray the driver says it, whose lines are not lost."""
    return f"{name:8} whole, skipped"


def _execute(context: Context, step: Step, keys: dict[str, str]) -> Step:
    stage, ranks = step.stage, context.ranks
    began = time.perf_counter()
    if ranks.is_first:
        print(f"{stage.name:8} {step.standing.value}: {step.why}", flush=True)
    if stage.alone:
        files = _together(ranks, lambda: stage.work(context, keys))
    else:
        files = stage.work(context, keys)

    def close() -> Step:
        entry = Entry(
            key=context.key,
            parts=_parts(context.config, stage),
            digest=_digest(context, stage),
            outputs=ledger.outputs(context.folder, files),
            seconds=round(time.perf_counter() - began, 1),
        )
        ledger.finish(context.folder, entry)
        print(f"{stage.name:8} done in {entry.seconds:.0f} s", flush=True)
        return replace(step, standing=Standing.WHOLE, why="made", entry=entry)

    return _together(ranks, close)


def _look(
    config: Config, root: Path, stage: Stage, stages: list[Stage], digests: dict[str, str]
) -> Step:
    there = {s.name for s in stages}
    needs = [need for need in stage.needs if need in there]
    missing = [need for need in needs if need not in digests]
    if missing:
        return Step(stage, None, Standing.FRESH, f"waits for {', '.join(missing)}")
    inputs = {need: digests[need] for need in needs} | _inputs(config, stage)
    parts = _parts(config, stage)
    key = ledger.key_of(stage.name, parts, inputs)
    standing, entry = ledger.standing(root / stage.folder, key)
    why = {
        Standing.FRESH: "nothing there yet",
        Standing.RESUME: "begun and not finished",
        Standing.WHOLE: "whole, skipped",
        Standing.STALE: "made from another config or other inputs",
    }[standing]
    if standing is Standing.STALE and entry is not None:
        changed = settings.differences(entry.parts, parts)
        why += f": {'; '.join(changed)}" if changed else " (its inputs changed)"
    return Step(stage, key, standing, why, entry)


def _peer_lost(error: RuntimeError, config: Config) -> PeerLost:
    return PeerLost(
        f"another rank died, or did not answer within {config.cluster.timeout_s:g} s: "
        f"{str(error).splitlines()[0]}",
        where="cluster.timeout_s",
        remedy="see what the other ranks say; the same command continues from the last checkpoint",
    )


def _make_room(config: Config, root: Path, step: Step, update: bool, force: bool) -> Step:
    """Mark the stage's folder as begun; a stale one is refused, set aside, or gone on with."""
    folder, key = root / step.stage.folder, step.key
    if key is None:
        raise UserError(
            f"the stage {step.stage.name} {step.why}",
            where=str(root),
            remedy="run the earlier stages first, or all: `cnn2gnn run`",
        )
    if step.standing is Standing.STALE and force and step.stage.trains:
        print(f"{step.stage.name:8} goes on all the same: {step.why}", flush=True)
    elif step.standing is Standing.STALE:
        if not (update or force):
            raise UserError(
                f"the stage {step.stage.name} of this folder was {step.why}",
                where=str(folder),
                remedy="another run.dir=…, or --update: the old results are kept beside the new"
                + ("; or --force: training goes on from its checkpoint" * step.stage.trains),
            )
        aside = ledger.set_aside(folder)
        print(f"{step.stage.name:8} old results moved to {aside.name}", flush=True)
        step = replace(step, standing=Standing.FRESH)
    ledger.begin(folder, Entry(key, _parts(config, step.stage)))
    return step


def _parts(config: Config, stage: Stage) -> dict[str, Any]:
    """The config fields behind a stage's key."""
    tree = settings.as_tree(config)
    parts: dict[str, Any] = {}
    for field in stage.fields:
        section, _, name = field.partition(".")
        value = tree[section][name] if name else tree[section]
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k not in EXECUTION}
        parts[field] = value
    return parts


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted paths."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _inputs(config: Config, stage: Stage) -> dict[str, str]:
    """Fingerprints of files outside the run: names, sizes and times."""
    data = config.data
    if stage.name == "pack" or (stage.name == "index" and data.source == "shards"):
        named = [origin for origin in (data.train, data.test) if origin is not None]
        facts = []
        for origin in named:
            for path in _looked_at(origin, data.source):
                if isinstance(path, str):  # a URL: what is read from it is held to its checksums
                    facts.append(path)
                    continue
                stat = path.stat()
                facts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
        return {"files": ledger.key_of("files", {"files": facts}, {})}
    return {}


def _looked_at(origin: str | list[str], source: str) -> list[Path | str]:
    """Files, or for a folder of images it and its class folders: too many files to look at all."""
    from cnn2gnn_dist.data.expand import files_of

    if source in ("shards", "parquet"):
        return [path if "://" in path else Path(path) for path in files_of(source, origin)]
    folder = Path(origin if isinstance(origin, str) else origin[0]).expanduser()
    return (
        [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        if folder.is_dir()
        else []
    )


def _digest(context: Context, stage: Stage) -> str:
    """What later stages build on: the manifests' content, else the stage's key."""
    if stage.name != "index":
        return context.key
    from cnn2gnn_dist.stages.context import load_manifest

    paths = (context.paths.train_manifest, context.paths.test_manifest)
    return ledger.key_of("index", {"digests": [load_manifest(p).digest for p in paths]}, {})


def _check_names(stages: list[Stage], names: list[str] | None) -> None:
    known = [stage.name for stage in stages]
    for name in names or []:
        if name not in known:
            raise UserError(
                f"this config has no stage {name!r}",
                where="stages",
                remedy=f"its stages: {', '.join(known)}",
            )


def _begin(config: Config, names: list[str] | None, world_size: int) -> None:
    ahead = [step for step in plan(config, names) if step.standing is not Standing.WHOLE]
    fit.check(config, [step.stage.name for step in ahead], world_size)
    ledger.claim(Path(str(config.run.dir)), settings.as_yaml(config))


@contextmanager
def _locked(root: Path, ranks: Ranks, timeout_s: float = 600.0) -> Iterator[None]:
    """Keep a second run out of the folder; the lock goes with rank 0, which holds it.

    Raises:
        UserError: on every rank: another process holds it.
    """
    held: list[folder_lock.Release] = []
    # The others wait in a collective, whose patience must outlast ours.
    seconds = min(LOCK_SECONDS, timeout_s / 2)
    try:
        _together(ranks, lambda: held.append(folder_lock.take(root, seconds)))
        yield
    finally:
        for release in held:
            release()


def _together(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Rank 0 does the work, however long it takes; all get its result, or raise its error."""
    from cnn2gnn_dist.training import distributed

    return distributed.alone(work)
