"""Sets of images answered together by a model of uneven classes, with and without its classes' shares counted once.

    python benchmarks/uneven_sets.py MODEL… --images 2000

MODEL: models of CIFAR-10's classes, such as FOLDER/long_tail/seed0/base/model of ``benchmarks/hard_labels.py``. Sets
are drawn from the first CIFAR-10 test images. The rule for sets is fitted on the model's calibration images,
as at export, and once more as if their classes were even (``inference/sets/class_shares.py``). It prints accuracies in
percent, mean ± deviation over the models.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

import numpy as np
import pyarrow.parquet as pq

import cnn2gnn_dist
from cnn2gnn_dist.inference.memory.old_classes import unit
from cnn2gnn_dist.inference.scoring import HeldOut
from cnn2gnn_dist.inference.sets import learned
from cnn2gnn_dist.inference.sets.learned import LearnedSets

SIZE, SETS = 16, 300
KINDS = {"1 class": 1, "2 classes": 2, "3 classes": 3, "strangers": 0}


def answered(folder: Path, count: int) -> dict[str, list[np.ndarray]]:
    """Answers [sets of a kind, rules] of one model, as shares of right answers."""
    model = cnn2gnn_dist.load(folder)
    held_out = HeldOut.read(Path(model.folder))
    assert held_out is not None
    assert model.scoring.zero_D is not None
    assert model.scoring.calibration is not None
    file = min((Path(os.environ.get("CNN2GNN_DATA", "../shared/data")) / "cifar10").glob("test*"))
    table = pq.read_table(file, columns=["image", "label"]).slice(0, count)
    label_N = table.column("label").to_numpy()
    made = [
        model.outputs(batch)
        for batch in model.batches([one["bytes"] for one in table.column("image").to_pylist()], 250)
    ]
    logits_NC = np.concatenate([one.logits for one in made])
    z_ND = unit(np.concatenate([one.x for one in made]) - model.scoring.zero_D)
    calibration = (
        held_out.images.logits_nC,
        unit(held_out.images.x_nD - model.scoring.zero_D),
        held_out.labels_n,
    )
    temperature = model.scoring.calibration.temperature
    rules = [LearnedSets.fit(*calibration, temperature=temperature)]
    with mock.patch.object(learned, "shift_of", return_value=None):
        rules.insert(0, LearnedSets.fit(*calibration, temperature=temperature))
    rng, found = np.random.default_rng(0), defaultdict(list)
    for kind, classes in KINDS.items():
        for _ in range(SETS):
            rows = drawn(label_N, classes, rng)
            logits, z, right = logits_NC[rows], z_ND[rows], label_N[rows]
            said = [logits, *(rule(logits, z).posterior_mC for rule in rules)]
            said += [rule.same(logits).posterior_mC for rule in rules]
            found[kind].append(np.array([(one.argmax(1) == right).mean() for one in said]))
    return found


def drawn(label_N: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Different rows of one set, of at most so many classes; 0 classes: any images."""
    if not classes:
        return rng.choice(len(label_N), SIZE, replace=False)
    chosen = rng.choice(np.unique(label_N), classes, replace=False)
    of_row = rng.choice(chosen, SIZE)
    rows = [
        rng.choice(np.flatnonzero(label_N == c), (of_row == c).sum(), replace=False) for c in chosen
    ]
    return np.concatenate(rows)


def table(found: list[dict[str, list[np.ndarray]]]) -> str:
    """What ``answered`` gives for each model, as Markdown: means over the sets, mean ± deviation over the models."""
    lines = [
        f"| {SIZE} images of | alone | per image | per set | `--same`: per image | per set |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, classes in KINDS.items():
        of_model = np.array([100 * np.mean(one[kind], axis=0) for one in found])
        columns = of_model.T if classes == 1 else of_model.T[:3]  # --same is for one class
        shown = [_spread(list(map(float, column))) for column in columns]
        lines.append(f"| {kind} | " + " | ".join([*shown, "", ""][:5]) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=2000)
    given = parser.parse_args()
    found = [answered(folder, given.images) for folder in given.models]
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
