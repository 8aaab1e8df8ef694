"""The method and all its controls on one data set: a table of accuracies, mean and deviation over seeds.

    python benchmarks/accuracy.py FOLDER --preset cifar10 --seeds 0 1 2
    python benchmarks/accuracy.py FOLDER --preset demo --seeds 0 --set teacher.epochs=2       (a trial)

For each seed, one run of the preset gives the teacher, the student with the learned graph, its self path, its
neighbors' vote, and the control (the same stem with an MLP head: same initial weights, norms, loss; the same batches
until the graph begins, from when on the student's have a fixed share of every partition: docs/architecture.md).
Further runs share its packed shards, its teacher and its soft targets:

    batch             the graph of the mini-batch (graph.scope=batch), evaluated in batches
    fixed_knn         the nearest neighbors by the features after the warm-up, in training; only their weights follow z
    built_once        one graph, from the features after the warm-up, for all of the training; evaluated with a new one
    labels            student and control without distillation, for the same epochs
    logit_adjust      student and control with student.logit_adjust=1, for long tails (only if asked for)
    labels_at_cost    the control without distillation, for as many operations as teacher, targets and control took
    shuffled          the student of the first run; at test time features and label of each of its neighbors, found and
                      weighted as before, are those of an arbitrary node

Everything is trained and evaluated by the product's own command, under torchrun. When it is run again, it continues
with what is missing, and with what today's code and data would no longer make; another preset or other overrides need
another folder. For every row it prints accuracy (mean ± deviation over seeds), the paired difference from the control,
parameters, FLOPs, milliseconds per image in batches and of an image alone, seconds of training and images seen;
``cells.jsonl`` has the figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from evaluated_apart import SHUFFLED, control_scores, shuffled_accuracy

from cnn2gnn_dist import durable, ledger, settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline import planning
from cnn2gnn_dist.report.labels import CONTROL
from cnn2gnn_dist.training.checkpoint.folder import read_state, recorded

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("shards", "manifest", "teacher", "targets")
"""Folders of a run from which its variants start."""
USUAL = ("batch", "fixed_knn", "built_once", "labels", "labels_at_cost", "shuffled")
VARIANTS = (*USUAL, "logit_adjust")
BASE_ROWS = ("teacher", "student", "self_path", "vote", CONTROL)
AT_COST = "labels_at_cost"
AT_COST_ROW = f"{AT_COST}: control"


def train(preset: str, folder: Path, options: list[str], stages: str | None = None) -> None:
    """Run the preset, or these stages of it, into a folder under torchrun; its output goes to a log next to it.

    Raises:
        CalledProcessError: it failed; the log says why.
    """
    ranks = settings.load(preset, options).run.ranks
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    line = [sys.executable, *torchrun, "launch/train.py", "--config", preset, f"run.dir={folder}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        only = ["--stages", stages] if stages else []
        subprocess.run([*line, *only, *options], stdout=log, stderr=log, check=True, cwd=ROOT)


def share(base: Path, folder: Path) -> None:
    """Give a variant the stages that it shares with the base run, as hard links."""
    for name in SHARED:
        if (base / name).exists() and not (folder / name).exists():
            shutil.copytree(base / name, folder / name, copy_function=_link)
    if not (folder / "config.yaml").exists():  # what makes it a run's folder
        shutil.copyfile(base / "config.yaml", folder / "config.yaml")


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def seconds(folder: Path, stage: str) -> float:
    """Wall seconds of a finished stage."""
    return float(json.loads((folder / stage / "done.json").read_text())["seconds"])


def steps(folder: Path, stage: str) -> int:
    """Optimizer steps of a finished training.

    An epoch of the student may have fewer than one of the control, where partitions have uneven shares.
    """
    last = recorded(folder / stage)
    assert last is not None, f"{stage} is complete"
    return int(read_state(last)["step"])


def overrides(variant: str, base: Path, options: list[str], preset: str) -> list[str]:
    """The overrides that make a variant of the preset."""
    config = settings.load(preset, options)
    student = config.student
    # Soft targets are smooth by themselves; hard labels get the teacher's smoothing, or a high rate diverges.
    no_distillation = [
        "student.distill_weight=0",
        f"student.label_smoothing={config.teacher.label_smoothing:g}",
    ]
    if variant == "batch":
        return ["graph.scope=batch", "student.control=false"]
    once = [f"graph.refresh_epochs={student.epochs}", "student.control=false"]
    if variant == "built_once":
        return once
    if (
        variant == "fixed_knn"
    ):  # the table has just the candidates of a step, so that none is left out
        count = config.graph.sampling.fanouts[0]
        return [*once, "graph.sampling.query=table", f"graph.candidates={count}"]
    if variant == "labels":
        return no_distillation
    if variant == "logit_adjust":
        return ["student.logit_adjust=1"]
    found = json.loads((base / "results.json").read_text())
    epochs = epochs_at_cost(config, found, labelled_share(base))
    return [*no_distillation, f"student.epochs={epochs}"]


def epochs_at_cost(config: Config, found: dict[str, Any], labelled: float = 1.0) -> int:
    """Epochs of the control whose operations equal those of teacher, targets and control together.

    A backward pass counts as two forward passes. Images of both trainings count as equally large.

    Args:
        config: of the base run.
        found: its results, with the FLOPs per image of teacher and control.
        labelled: share of the training images that have a label; the teacher trains on no others, but answers for all.
    """
    control = 3 * config.student.epochs * found[CONTROL]["flops"]
    passes = 3 * config.teacher.epochs * labelled + max(config.targets.views, 1)
    return round(config.student.epochs * (control + passes * found["teacher"]["flops"]) / control)


def labelled_share(run: Path) -> float:
    """Share of a run's training images that have a label."""
    label_N = np.asarray(Manifest.load(run / "manifest" / "train.arrow").label_N)
    return float((label_N >= 0).mean())


def rows_of(variant: str) -> dict[str, str]:
    """Rows of a variant's results, and their names in the table."""
    if variant == "shuffled":
        return {"student": variant}
    if variant == AT_COST:
        return {CONTROL: AT_COST_ROW}
    self_path = {"self_path": f"{variant}: self path"}
    if variant in ("labels", "logit_adjust"):
        return {"student": f"{variant}: student", **self_path, CONTROL: f"{variant}: control"}
    return {"student": variant, **self_path}


def cells(
    folder: Path, preset: str, seed: int, variants: list[str], options: list[str]
) -> Iterator[dict[str, Any]]:
    """All rows of one seed."""
    options = [*options, f"seed={seed}"]
    base = folder / f"seed{seed}" / "base"
    train(preset, base, options)
    of_base = json.loads((base / "results.json").read_text())
    for row in BASE_ROWS:
        yield _cell(row, seed, of_base[row], base, "teacher" if row == "teacher" else None)
    for variant in variants:
        if variant == "shuffled":
            cell = {"row": "shuffled", "seed": seed, "accuracy": shuffled_accuracy(base)}
            yield {**cell, "made_by": made_by(base, variant)}
            continue
        made = folder / f"seed{seed}" / variant
        share(base, made)
        more = overrides(variant, base, options, preset)
        if variant == AT_COST:
            train(preset, made, [*options, *more], stages="control")
            figures = of_base[CONTROL] | control_scores(made)  # of one size, so of equal cost
            yield _cell(AT_COST_ROW, seed, figures, made, None, CONTROL)
            continue
        train(preset, made, [*options, *more])
        found = json.loads((made / "results.json").read_text())
        for row, name in rows_of(variant).items():
            yield _cell(name, seed, found[row], made, None, row)


def _cell(
    name: str, seed: int, found: dict[str, Any], run: Path, stage: str | None, row: str = ""
) -> dict[str, Any]:
    stage = stage or ("control" if (row or name) == CONTROL else "student")
    config = settings.load(str(run / "config.yaml"), [])
    trained = config.teacher if stage == "teacher" else config.student
    kept = ("accuracy", "balanced_accuracy", "ece", "parameters", "flops", "ms_per_image")
    return {
        "row": name,
        "seed": seed,
        **{key: found[key] for key in kept},
        "ms_alone": found.get("ms_alone"),  # runs of earlier versions have none
        "made_by": made_by(run, AT_COST if name == AT_COST_ROW else ""),
        "train_seconds": seconds(run, stage),
        "images_seen": steps(run, stage) * trained.global_batch,
    }


def made_by(run: Path, variant: str = "") -> str | None:
    """What a run's cells are made by: its last stage, whose digest contains those before it; None: it has none."""
    found = ledger.finished(run / ("control" if variant == AT_COST else "evaluation"))
    return found and found.digest + (f" shuffled {SHUFFLED}" if variant == "shuffled" else "")


def is_complete(
    known: list[dict[str, Any]],
    folder: Path,
    preset: str,
    seed: int,
    variants: list[str],
    options: list[str],
) -> bool:
    """Whether a seed has all cells, and its runs are those that made them and that would be made today.

    Cells of runs that have been removed can't be checked: they are kept, with a note on stderr.
    """
    cell_of = {c["row"]: c for c in known if c["seed"] == seed}
    if not cell_of.keys() >= wanted(variants):
        return False
    base, options = folder / f"seed{seed}" / "base", [*options, f"seed={seed}"]
    for variant in ("base", *variants):
        own = variant not in ("base", "shuffled")
        run = base.with_name(variant) if own else base
        if not (base / ledger.CONFIG).is_file() or not (run / ledger.CONFIG).is_file():
            print(f"{run} is gone: its cells are kept unchecked", file=sys.stderr)
            continue
        names = BASE_ROWS if variant == "base" else rows_of(variant).values()
        if any(cell_of[name].get("made_by") != made_by(run, variant) for name in names):
            return False
        more = overrides(variant, base, options, preset) if own else []
        config = settings.load(preset, [*options, *more, f"run.dir={run}"])
        stages = ["control"] if variant == AT_COST else None
        if any(step.status is not Status.COMPLETE for step in planning.plan(config, stages)):
            return False
    return True


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown: means and deviations over seeds; differences from the control, paired by seed."""
    control = {c["seed"]: c["accuracy"] for c in found if c["row"] == CONTROL}
    lines = [
        "| | accuracy | minus control | parameters | MFLOP / image | ms / image | ms alone | seconds | images seen |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in dict.fromkeys(c["row"] for c in found):
        of_row = [c for c in found if c["row"] == row]
        apart = [100 * (c["accuracy"] - control[c["seed"]]) for c in of_row]
        first = of_row[0]
        costs = [""] * 6
        if "flops" in first:
            costs = [
                f"{first['parameters']:,}",
                f"{first['flops'] / 1e6:.1f}",
                f"{mean(c['ms_per_image'] for c in of_row):.3f}",
                _alone(of_row),
                f"{mean(c['train_seconds'] for c in of_row):.0f}",
                f"{first['images_seen']:,}",
            ]
        figures = [_spread([100 * c["accuracy"] for c in of_row]), _spread(apart, "+.2f")]
        lines.append(f"| {row} | {' | '.join([*figures, *costs])} |")
    return "\n".join(lines)


def _alone(of_row: list[dict[str, Any]]) -> str:
    """Milliseconds of an image by itself; empty if a cell has none."""
    found = [c.get("ms_alone") for c in of_row]
    return "" if None in found else f"{mean(found):.3f}"


def _spread(values: list[float], form: str = ".2f") -> str:
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def claim(folder: Path, preset: str, options: list[str]) -> None:
    """Record what the folder's cells are made with: cells of a trial must not pass for those of another config.

    Raises:
        SystemExit: it has cells of another config.
    """
    file = folder / "config.json"
    now = json.loads(json.dumps(settings.as_tree(settings.load(preset, options))))
    if file.exists():
        changed = settings.differences(json.loads(file.read_text()), now)
        if changed:
            raise SystemExit(f"{folder} has cells of another config: {'; '.join(changed)}")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=1))


def merged(known: list[dict[str, Any]], made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells, with those just made in place of earlier ones of the same row and seed."""
    new = {(c["row"], c["seed"]) for c in made}
    return [c for c in known if (c["row"], c["seed"]) not in new] + made


def main() -> int:
    """Fill in the missing cells and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(USUAL))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="overrides")
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained at a time")
    given = parser.parse_args()
    folder = given.folder.resolve()
    preset = str(Path(given.preset).resolve()) if Path(given.preset).is_file() else given.preset
    file = folder / "cells.jsonl"
    claim(folder, preset, given.set)
    known = durable.read_lines(file) if file.exists() else []
    what = given.variants, given.set
    complete = {seed for seed in given.seeds if is_complete(known, folder, preset, seed, *what)}

    def fill(seed: int) -> list[dict[str, Any]]:
        return list(cells(folder, preset, seed, *what))

    with ThreadPoolExecutor(given.jobs) as pool:
        jobs = {pool.submit(fill, seed): seed for seed in given.seeds if seed not in complete}
        for job in as_completed(jobs):
            known = merged(known, job.result())
            durable.write_text(file, "".join(json.dumps(c) + "\n" for c in known))
    print(table(durable.read_lines(file)))
    return 0


def wanted(variants: list[str]) -> set[str]:
    """Names of the rows of the base run and of these variants."""
    names = {name for variant in variants for name in rows_of(variant).values()}
    return names - {"student"} | set(BASE_ROWS)


if __name__ == "__main__":
    raise SystemExit(main())
