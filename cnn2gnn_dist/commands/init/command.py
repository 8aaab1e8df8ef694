"""``cnn2gnn init``: look at the user's images, and write a config that trains on them in the given time."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cnn2gnn_dist import consistency, durable, settings
from cnn2gnn_dist.commands.init import fitting, recipe, speed, text, weights
from cnn2gnn_dist.commands.init.sources import find_source
from cnn2gnn_dist.commands.init.survey import Survey, look, measure_views
from cnn2gnn_dist.config import Config, ViewsConfig
from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.log import output, quoted
from cnn2gnn_dist.stages.shared import preflight

_log = logging.getLogger(__name__)
_STAGES = ("teacher", "student", "graph", "control")
Say = Callable[[str], None]
_ENOUGH = 0.7  # of the wanted epochs
_CERTAIN = 3.0  # points: larger standard errors are reported
_SHORTEST, _LONGEST = 1.0, 60 * 24 * 30.0


def command(
    place: str,
    out: str,
    minutes: float,
    *,
    weights_file: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    idle: bool = False,
    label_column: str | None = None,
) -> int:
    """Write the config, or print it in a dry run; returns 0.

    ``idle``: the other processes that slow this machine down now won't be running then. ``label_column``: of Parquet
    files; None: found by its name or type.

    Raises:
        UserError: the images can't be trained on; the file exists (and no ``force``) or can't be written; the
            minutes are out of range.
    """
    if not _SHORTEST <= minutes <= _LONGEST:
        raise UserError(
            f"{minutes:g} minutes are out of range",
            where="--minutes",
            remedy="--minutes 30, for example; at least 1",
        )
    path = Path(out)
    if path.exists() and not (force or dry_run):
        raise UserError(
            "the file exists", where=out, remedy="--out another.yaml, or --force to replace it"
        )
    if not path.parent.is_dir():
        raise UserError(
            "there is no such folder", where=str(path.parent), remedy="create it, or another --out"
        )
    if not dry_run:
        durable.check_writable(path)
    say: Say = _log.info if dry_run else output  # a dry run's stdout is the config and nothing else
    known = weights.from_file(weights_file) if weights_file else weights.cached()
    survey = look(find_source(place), label_column=label_column)
    _print_survey(survey, say)
    found = _choose(survey, speed.this_machine(), known, minutes, idle)
    written = _text(place, survey, found, minutes)
    _print_plan(found, minutes, say)
    if dry_run:
        output(written, end="")
        return 0
    durable.write_text(path, written)
    output(f"\nwritten  {out}\nnext     cnn2gnn run --config {quoted(out)}")
    return 0


@dataclass(frozen=True)
class _Choice:
    tree: dict[str, Any]
    estimate: fitting.Estimate
    machine: speed.Machine


def facts_of(survey: Survey, decode_s: float = 0.0) -> recipe.Facts:
    """The facts of a survey that the choices depend on."""
    short_N = survey.sides.min(axis=1)
    return recipe.Facts(
        survey.count_C,
        survey.held,
        survey.short_side,
        alike=bool((short_N == short_N[0]).all()),
        grey=survey.grey > 0.95,
        bad=survey.share,
        decode_s=decode_s,
    )


def _choose(
    survey: Survey, machine: speed.Machine, known: dict[str, Any] | None, minutes: float, idle: bool
) -> _Choice:
    """The most expensive networks that leave time for enough epochs, found by timing some (bisection)."""
    facts = facts_of(survey)
    recipe.check_enough(facts)
    images, num_classes = recipe.training_images(facts), len(survey.classes)
    machine = recipe.ranks_for(images, machine)
    nets = _by_cost(facts, machine, known, num_classes)
    low, high, best = 0, len(nets), None  # nets below `low` fit, nets from `high` on don't
    with speed.Stopwatch(machine, idle=idle) as stopwatch:
        while best is None or low < high:
            number = (low + high) // 2
            net = nets[number]
            _log.info(f"timing   {net.teacher['arch']} on images of {net.size} pixels")
            *_, decode_s, render_s = measure_views(
                survey, _spec(recipe.views(facts, net)), speed.clock(idle)
            )
            own = replace(facts, decode_s=decode_s + render_s)
            config = settings.check(_with_data(recipe.tree(own, machine, net, 8), survey))
            seen = stopwatch.time(config, num_classes, images)
            if seen is None:
                if number == 0:
                    raise UserError(
                        "not even the smallest network fits into the memory of the GPU",
                        where=f"{net.size} pixels, {net.teacher['arch']}",
                        remedy="end other processes that use it, or use the CPU: CUDA_VISIBLE_DEVICES= cnn2gnn init …",
                    )
                high = number
                continue
            tree, estimate, fits = fitting.fit(own, machine, net, seen, minutes)
            wanted = recipe.wanted_epochs(images, "weights" in net.teacher)
            _log.debug(
                f"{net.size} pixels, {net.teacher['arch']} {net.teacher['args']}: {fits} epochs fit, "
                f"{wanted:.0f} are wanted; {seen}"
            )
            if fits >= _ENOUGH * wanted:
                low = number + 1
            else:
                high = number
            if fits >= _ENOUGH * wanted or number == 0:
                best = _Choice(tree, estimate, machine)
    return best


def _by_cost(
    facts: recipe.Facts, machine: speed.Machine, known: dict[str, Any] | None, num_classes: int
) -> list[recipe.Net]:
    found = recipe.nets(facts, machine, known)
    if known is not None and not found:
        _log.warning(
            f"the pretrained weights of {known['arch']} are for images of {known['size']} pixels or "
            f"more, and the images' median side is {facts.short_side}: they are not used"
        )
        found = recipe.nets(facts, machine, None)
    costs = []
    for net in found:
        tree = recipe.tree(facts, machine, net, 8)
        costs.append(speed.teacher_flops(settings.check({**tree, "name": "x"}), num_classes))
    return [found[i] for i in np.argsort(costs, kind="stable")]


def _spec(views: dict[str, Any]) -> ViewSpec:
    own = {name: value for name, value in views.items() if name not in ("padding", "flip")}
    alternating = views.get("flip") == "alternating"
    return ViewSpec(**own, reflect=views.get("padding") == "reflect", alternating=alternating)


def _with_data(tree: dict[str, Any], survey: Survey) -> dict[str, Any]:
    """The complete config: name, data, and the measured mean and std."""
    source, facts = survey.source, facts_of(survey)
    data: dict[str, Any] = {"source": source.kind, "train": _escaped(source.train)}
    if source.test is not None:
        data["test"] = _escaped(source.test)
    else:
        data["holdout"] = recipe.holdout(facts)
    if recipe.CALIBRATION:
        data["calibration"] = recipe.CALIBRATION
    if survey.columns != ("image", "label"):
        data["image_column"], data["label_column"] = survey.columns
    if survey.empty and not survey.sampled:
        data["allow_empty_classes"] = True  # otherwise the run refuses them
    if source.kind != "shards" and survey.images < 5 * 2048:  # several shards, to shuffle over
        data["shard_size"] = max(32, -(-survey.images // 8))
    if survey.share > 0:
        data["max_corrupt"] = min(1.0, round(max(0.002, 1.5 * survey.share + 0.005), 3))
    mean, std = (ViewsConfig.model_fields[name].default for name in ("mean", "std"))  # ImageNet's
    if "weights" not in tree["teacher"]:
        mean, std, *_ = measure_views(survey, _spec(tree["views"]))
    moments = {
        "mean": [round(float(value), 3) for value in mean],
        "std": [round(float(value), 3) for value in std],
    }
    views = {**tree["views"], **moments}
    return {"name": _name(source.train), **tree, "data": data, "views": views}


def _name(train: str | list[str]) -> str:
    """A name for the run, from the folder."""
    first = Path(train if isinstance(train, str) else train[0])
    plain = first.parent if first.suffix in (".tar", ".parquet") else first
    words = [part for part in (plain.name, plain.parent.name) if part not in ("train", "data", "")]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", words[0] if words else "mine").strip("-.")
    return name or "mine"


def _escaped(paths: str | list[str]) -> str | list[str]:
    if isinstance(paths, str):
        return paths.replace("$", "$$")
    return [path.replace("$", "$$") for path in paths]


def _text(place: str, survey: Survey, found: _Choice, minutes: float) -> str:
    tree = _with_data(found.tree, survey)
    machine = found.machine
    low, high = np.percentile(survey.sides.min(axis=1), [0, 100])
    head = [
        f"Written by `cnn2gnn init {place} --minutes {minutes:g}` for {machine.ranks} "
        f"{'GPU' if machine.device == 'cuda' else 'CPU rank'}{'s' * (machine.ranks > 1)}.",
        f"{survey.images:,} images of {len(survey.classes)} classes; shorter sides {low:.0f} to {high:.0f} "
        f"pixels; predicted: {found.estimate.minutes:.0f} minutes.",
        "cnn2gnn run --config THIS_FILE; every field and its meaning: cnn2gnn config",
    ]
    if survey.source.note:
        head.append(f"Note: {survey.source.note}.")
    if survey.guess:
        head.append(f"Note: {survey.guess}.")
    written = text.as_text(head, tree)
    config = _checked(written)
    preflight.check(config, _STAGES, config.run.ranks)
    preflight.check_images(config, _STAGES, recipe.training_images(facts_of(survey)))
    for note in consistency.notes(config):
        _log.warning(note)
    return written


def _checked(written: str) -> Config:
    tree = yaml.safe_load(written)
    return settings.check(tree)


def _print_survey(survey: Survey, say: Say) -> None:
    source, count_C = survey.source, survey.count_C[survey.count_C > 0]
    say(f"images   {survey.images:,} in {_shown(source.train)} ({source.kind})")
    if source.test is not None:
        say(f"held out {survey.held:,} in {_shown(source.test)}")
    say(
        f"classes  {len(survey.classes)}; images of each: {count_C.min():,} at least, median "
        f"{int(np.median(count_C)):,}, {count_C.max():,} at most; "
        f"the most frequent class is {count_C.max() / survey.images:.1%} of all"
    )
    high, wide = np.median(survey.sides, axis=0)
    short_N = survey.sides.min(axis=1)
    kinds = ", ".join(f"{kind} {count}" for kind, count in survey.formats.most_common())
    say(
        f"sizes    median {wide:.0f} x {high:.0f}, shorter side {short_N.min()} to {short_N.max()} "
        f"({len(short_N)} decoded: {kinds}{'; gray' if survey.grey > 0.95 else ''})"
    )
    for reason, count in survey.unreadable.most_common(5):
        say(f"bad      {count} of {survey.looked_at}: {reason[:100]}")
    for note in survey.notes:
        say(f"note     {note}")
    held = recipe.held_images(facts_of(survey))
    error = 50 / math.sqrt(max(1, held))  # of an accuracy of one half, the largest
    if error > _CERTAIN:
        again = "" if source.test is not None else "; other seeds (seed=1) hold out others"
        say(
            f"note     {held} images are held out: an accuracy has a standard error of up to {error:.0f} points{again}"
        )


def _shown(paths: str | list[str]) -> str:
    if isinstance(paths, str):
        return paths
    return f"{os.path.basename(paths[0])} and {len(paths) - 1} more files"


def _print_plan(found: _Choice, minutes: float, say: Say) -> None:
    tree, estimate = found.tree, found.estimate
    teacher, student = tree["teacher"], tree["student"]
    say(
        f"chosen   {tree['views']['size']} pixels; teacher {teacher['arch']} for {teacher['epochs']} epochs"
        f"{' from pretrained weights' if 'weights' in teacher else ''}, student {student['stem']} for "
        f"{student['epochs']}; {found.machine.ranks} ranks ({found.machine.device})"
    )
    parts = ", ".join(f"{name} {spent / 60:.1f}" for name, spent in estimate.seconds.items())
    say(f"minutes  {estimate.minutes:.1f} predicted ({minutes:g} requested): {parts}")
    if note := fitting.too_long(estimate, minutes, found.machine.device):
        say(f"note     {note}")
