"""What a training of a given length gives: the whole method, and the teacher's network alone, on one data set.

    python benchmarks/minutes.py FOLDER --reference RUN --minutes 5 15

RUN is a finished run of the preset on an otherwise idle machine, with a control. From its stages' times follow the
whole epochs that fit in each number of minutes: for the whole method (teacher, soft targets, student, graph; without
control and export), both trainings are shortened alike; for the teacher's network alone, all of the time is training.
Nothing else about the recipe changes. So the machine need not be idle while this runs, and the minutes of each run are
printed beside the budget. When it is run again, it continues with what is missing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from accuracy import claim, seconds, train

from cnn2gnn_dist import settings
from cnn2gnn_dist.config import Config

METHOD = ("teacher", "targets", "student", "graph")
"""Stages whose times count: what it takes to have accuracies."""
TRAININGS = ("teacher", "student")


def shortened(config: Config, times: dict[str, float], minutes: float) -> list[str]:
    """Overrides that make the whole method take this long.

    Args:
        config: that of the reference.
        times: seconds of its stages ``METHOD``.
        minutes: the budget.

    Raises:
        ValueError: too little for the other stages.
    """
    fixed = sum(times[stage] for stage in METHOD if stage not in TRAININGS)
    left = 60 * minutes - fixed
    if left <= 0:
        raise ValueError(f"the stages without a training already take {fixed / 60:.1f} minutes")
    share = left / sum(times[stage] for stage in TRAININGS)
    student = max(2, int(config.student.epochs * share))
    start = round(student * config.graph.start_epoch / config.student.epochs)
    return [
        f"teacher.epochs={max(1, int(config.teacher.epochs * share))}",
        f"student.epochs={student}",
        f"graph.start_epoch={min(start, student - 1)}",
        f"graph.refresh_epochs={min(config.graph.refresh_epochs, student)}",
        "student.control=false",
    ]


def teacher_alone(config: Config, times: dict[str, float], minutes: float) -> list[str]:
    """Overrides that spend the budget on the teacher; one epoch of a student, since a run has one."""
    epochs = max(1, int(config.teacher.epochs * 60 * minutes / times["teacher"]))
    student = ["student.epochs=1", "graph.scope=batch", "student.control=false"]
    return [f"teacher.epochs={epochs}", *student]


WAYS = {"method": ("the whole method", shortened), "alone": ("its teacher alone", teacher_alone)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", type=Path, required=True, metavar="RUN")
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 15])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(WAYS), help="one of the two")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    options = [*arguments.set, f"seed={arguments.seed}"]
    config = settings.load(arguments.preset, options)
    times = {stage: seconds(arguments.reference, stage) for stage in METHOD}
    claim(arguments.folder, arguments.preset, options)
    print("| minutes | trained | epochs: teacher, student | teacher | student | took |")
    print("| --- | --- | --- | --- | --- | --- |")
    for minutes in arguments.minutes:
        for way in [arguments.only] if arguments.only else WAYS:
            name, make = WAYS[way]
            changed = make(config, times, minutes)
            run = arguments.folder / f"{way}-{minutes:g}-seed{arguments.seed}"
            train(arguments.preset, run, [*options, *changed])
            found = json.loads((run / "results.json").read_text(encoding="utf-8"))
            made = settings.load(arguments.preset, [*options, *changed])
            whole = make is shortened
            spent = sum(seconds(run, stage) for stage in (METHOD if whole else ("teacher",)))
            epochs = (
                f"{made.teacher.epochs}, {made.student.epochs}" if whole else made.teacher.epochs
            )
            student = f"{found['student']['accuracy']:.2%}" if whole else ""
            print(
                f"| {minutes:g} | {name} | {epochs} | {found['teacher']['accuracy']:.2%} | {student} "
                f"| {spent / 60:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
