"""The student and its control where labels are rare, wrong or unevenly distributed, on CIFAR-10.

    python benchmarks/hard_labels.py FOLDER --seeds 0 1 2
    python benchmarks/hard_labels.py FOLDER --sets noise --set teacher.epochs=1 student.epochs=4       (a trial)

For every set, a Parquet file of training images is written from those of CIFAR-10, and ``benchmarks/accuracy.py`` is
run on it:

    long_tail   class c keeps 5000 * 100^(-c/9) images; the variant logit_adjust with it
    noise       40 % of the labels are replaced by another class; the variants labels and labels_at_cost (no
                distillation) with it
    few         10 % of the images keep their label; from the others, the student learns the soft targets alone
    few_alone   the labeled images of few and no others, as many times as few shows images; the variants labels and
                labels_at_cost with it (in few, nine tenths of their batches would have nothing to learn from)

Test images and their labels stay as they are. The choice of images and labels depends on the set alone, not on the seed
of the training. Run again, it continues with what is missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from kept_files import digest, made_from

CLASSES, IMBALANCE, FLIPPED, LABELLED = 10, 100, 0.4, 0.1
VARIANTS = {
    "long_tail": ["logit_adjust"],
    "noise": ["labels", "labels_at_cost"],
    "few": [],
    "few_alone": ["labels", "labels_at_cost"],
}
OPTIONS = {
    "long_tail": ["teacher.epochs=10", "student.epochs=16", "graph.start_epoch=8"],
    "noise": [],
    "few": ["data.unlabelled=true", "teacher.epochs=50"],  # over the labeled images
    # The recipe's 8, 4 and 2 epochs, times ten.
    "few_alone": [
        *("teacher.epochs=50", "student.epochs=80", "graph.start_epoch=40"),
        "graph.refresh_epochs=20",
    ],
}
STABLE = ["student.lr=0.15", "student.stem_lr=5"]
"""The recipe's rate for the stem alone: on the long tail the head died at it, and the student answered one class.

The gates of the neighbors' path learn at the head's rate, so that they stay even closer to 0 than in the recipe.
"""
Labels = tuple[np.ndarray, np.ndarray]


def long_tail(label_N: np.ndarray, rng: np.random.Generator) -> Labels:
    """Rows that are kept, and their labels: fewer images of every further class, down to a hundredth."""
    kept = []
    for c in range(CLASSES):
        rows = np.flatnonzero(label_N == c)
        share = IMBALANCE ** (-c / (CLASSES - 1))
        kept.append(rng.permutation(rows)[: round(len(rows) * share)])
    rows_M = np.sort(np.concatenate(kept))
    return rows_M, label_N[rows_M]


def noise(label_N: np.ndarray, rng: np.random.Generator) -> Labels:
    """All rows; two fifths of the labels are those of another class."""
    flipped_N = rng.random(len(label_N)) < FLIPPED
    others_N = (label_N + rng.integers(1, CLASSES, len(label_N))) % CLASSES
    return np.arange(len(label_N)), np.where(flipped_N, others_N, label_N)


def few(label_N: np.ndarray, rng: np.random.Generator) -> Labels:
    """All rows; nine tenths of the labels are unknown (-1), the same share in every class."""
    known_N = np.zeros(len(label_N), bool)
    for c in range(CLASSES):
        rows = np.flatnonzero(label_N == c)
        known_N[rng.permutation(rows)[: round(len(rows) * LABELLED)]] = True
    return np.arange(len(label_N)), np.where(known_N, label_N, -1)


def few_alone(label_N: np.ndarray, rng: np.random.Generator) -> Labels:
    """The rows that ``few`` leaves their label."""
    rows_N, known_N = few(label_N, rng)
    return rows_N[known_N >= 0], known_N[known_N >= 0]


MAKERS: dict[str, Callable[[np.ndarray, np.random.Generator], Labels]] = {
    "long_tail": long_tail,
    "noise": noise,
    "few": few,
    "few_alone": few_alone,
}


def write(name: str, source: Path, file: Path) -> None:
    """Write a set's training images, with the column types and the metadata of CIFAR-10's, unless they are there."""
    files = sorted(source.glob("train*.parquet"))
    label_N = np.concatenate(
        [pq.read_table(one, columns=["label"])["label"].to_numpy() for one in files]
    )
    rows_M, label_M = MAKERS[name](label_N, np.random.default_rng(0))
    # What a maker chooses, not how it is written, so that no change of either is missed.
    chosen = [rows_M.tolist(), label_M.tolist()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with made_from(digest(chosen, files=files), file) as missing:
        if missing:
            _write(files, rows_M, label_M, file)


def _write(files: list[Path], rows_M: np.ndarray, label_M: np.ndarray, file: Path) -> None:
    table = pa.concat_tables(pq.read_table(one) for one in files)
    made = table.take(pa.array(rows_M))
    column = made.schema.get_field_index("label")
    made = made.set_column(column, made.schema.field(column), pa.array(label_M, pa.int64()))
    part = file.with_suffix(".part")
    pq.write_table(made, part, row_group_size=1000)
    part.rename(file)


def main() -> int:
    """Make the sets and print a table for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--preset", default=str(Path(__file__).parent / "recipes/cifar10_short.yaml")
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="overrides")
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained at a time")
    given = parser.parse_args()
    source = Path(os.environ.get("CNN2GNN_DATA", "../shared/data")) / "cifar10"
    for name in given.sets:
        file = given.folder.resolve() / name / "train.parquet"
        write(name, source, file)
        line = [sys.executable, str(Path(__file__).with_name("accuracy.py")), str(file.parent)]
        line += ["--preset", given.preset, "--jobs", str(given.jobs)]
        line += ["--seeds", *map(str, given.seeds)]
        line += ["--variants", *VARIANTS[name]]
        line += ["--set", f"data.train={file}", *STABLE, *OPTIONS[name], *given.set]
        print(f"\n{name}\n", flush=True)
        subprocess.run(line, check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
