"""``cnn2gnn init`` on images of several kinds: does it keep to the time, and how good is the student?

    python benchmarks/first_config.py FOLDER [photographs mini10 six cifar10] [--minutes 5] [--seeds 3]

Each set is made in FOLDER from the data in ``$CNN2GNN_DATA``, in the form in which a user would have it (``SETS``);
``cnn2gnn init`` writes a config for it, and ``torchrun`` runs it once per seed (where images are split off, another
seed holds out other images). It prints a row per set. Minutes: asked for, predicted and taken, by the clock and by the
processors (processor time of all processes divided by the number of cores: the least that an otherwise idle machine
would take). Held-out accuracies: of teacher, student and control, of a linear probe, and of always answering the most
frequent class; they are means over the seeds. Then the difference between student and probe with its standard error,
paired over the same images. The probe is a logistic regression on the student's own features of the training images,
with the strength of regularization (of ``STRENGTHS``) that five-fold cross-validation prefers. Another column has
the strength that is best on the held-out images themselves, which nobody could choose in practice.

It exits with 1 if a student is below the probe by more than ``ERRORS`` of these standard errors, or below the most
frequent class, or if a run took ``LATE`` times the minutes asked for, by the processors. A set with forty held-out
images needs several seeds: one image is 2.5 points there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STRENGTHS = (0.003, 0.03, 0.3)
ERRORS, LATE = 2.0, 1.5
MODELS = ("teacher", "student", "control_mlp")
ANIMALS = 398
"""ImageNet's labels below this are animals."""
COLUMNS = (
    *("images", "asked", "predicted", "by the clock", "by the processors"),
    *("teacher", "student", "control", "linear probe", "student - probe", "best of three probes"),
    "most frequent class",
)


def photographs(folder: Path, data: Path) -> str:
    """200 full-size photographs in two classes: the animals of the ImageNet sample, and its other things."""
    for shard in sorted((data / "imagenet-sample").glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, content in files.items():
            if name.endswith(".jpg"):
                animal = int(files[name[:-3] + "cls"]) < ANIMALS
                write(folder / ("animal" if animal else "thing") / name, content)
    return str(folder)


def mini_imagenet(folder: Path, data: Path, classes: Iterable[int], each: int) -> str:
    """Some classes of Mini-ImageNet, with a given number of images each, as a folder of folders."""
    left = dict.fromkeys(classes, each)
    for file in sorted((data / "mini-imagenet").glob("train-*.parquet")):
        rows = pq.read_table(file, columns=["image", "label"]).to_pylist()
        for number, row in enumerate(rows):
            if left.get(row["label"], 0):
                left[row["label"]] -= 1
                name = f"{file.stem[:11]}-{number:05d}.jpg"
                write(folder / f"class-{row['label']:02d}" / name, row["image"]["bytes"])
    assert not any(left.values()), "the data set has fewer images"
    return str(folder)


SETS: dict[str, Callable[[Path, Path], str]] = {
    "photographs": photographs,
    "mini10": lambda folder, data: mini_imagenet(folder, data, range(0, 100, 10), 100),
    "six": lambda folder, data: mini_imagenet(folder, data, range(3, 100, 17), 60),
    "cifar10": lambda _, data: str(data / "cifar10"),
}
"""Name → function (folder to write to, data) that writes the set and returns the arguments for ``init``."""


def write(path: Path, content: bytes) -> None:
    """Write a file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def run(command: list[str], log: Path) -> float:
    """Run a command with its output in a file; returns seconds of processor time.

    Raises:
        CalledProcessError: it failed; the log says why.
    """

    def spent() -> float:
        times = os.times()
        return times.children_user + times.children_system

    before = spent()
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True, cwd=ROOT)
    return spent() - before


def references(folder: Path) -> dict[str, Any]:
    """Which held-out images of a run the student, the linear probe and the most frequent class get right."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from cnn2gnn_dist.commands.audit.source import open_source

    source = open_source(folder)
    x_ND = np.asarray(source.training.x_ND, np.float32)
    labels_N = source.training.labels_N
    held = source.held_out(lambda rows, _: rows)
    assert held is not None
    with np.load(folder / "evaluation" / "student.npz") as answers:
        rows_Q, labels_Q, predicted_Q = (answers[key] for key in ("ids", "labels", "predicted"))
    x_QD = held.x_QD[rows_Q].astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weakest regularization need not converge
        heads = [
            make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
            for strength in STRENGTHS
        ]
        preferred = int(np.argmax([cross_val_score(head, x_ND, labels_N).mean() for head in heads]))
        probes = [head.fit(x_ND, labels_N).predict(x_QD) == labels_Q for head in heads]
    right = {
        "student": predicted_Q == labels_Q,
        "probe": probes[preferred],
        "best_probe": max(probes, key=np.count_nonzero),
        "frequent": labels_Q == np.bincount(labels_N).argmax(),
    }
    return {name: right_Q.astype(int).tolist() for name, right_Q in right.items()}


def trial(
    name: str, root: Path, data: Path, minutes: float, seeds: int, options: list[str]
) -> list[dict[str, Any]]:
    """Make the set, let ``init`` look at it, run what it wrote; the figures of each seed."""
    images, config = root / name, root / f"{name}.yaml"
    shutil.rmtree(images, ignore_errors=True)
    place = SETS[name](images, data)
    run(
        [sys.executable, "-m", "cnn2gnn_dist", "init", place, "--minutes", f"{minutes:g}", "--out",
         str(config), "--force", *options], root / f"{name}-init.log",
    )  # fmt: skip
    said = (root / f"{name}-init.log").read_text(encoding="utf-8")
    predicted = re.search(r"^minutes +([\d.]+) predicted", said, re.M)
    minutes_of = {
        "asked": minutes,
        "predicted": float(predicted[1]) if predicted else float("nan"),
    }
    found = []
    for seed in range(seeds):
        found.append(
            {"name": name, "seed": seed, **minutes_of, **one_run(config, root, name, seed)}
        )
        with (root / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found[-1]) + "\n")
    return found


def one_run(config: Path, root: Path, name: str, seed: int) -> dict[str, Any]:
    """Run a config; return the minutes it took, the accuracies, and which held-out images are right."""
    out = root / f"{name}-run"
    shutil.rmtree(out, ignore_errors=True)
    ranks = yaml.safe_load(config.read_text(encoding="utf-8"))["run"]["ranks"]
    began = time.monotonic()
    training = run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
         "--standalone", "launch/train.py", "--config", str(config), f"run.dir={out}",
         f"seed={seed}", "stream.backend=local"], root / f"{name}-run.log",
    )  # fmt: skip
    taken = (time.monotonic() - began) / 60
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return {
        "clock": taken,
        "processors": training / len(os.sched_getaffinity(0)) / 60,
        "accuracy": {model: results[model]["accuracy"] for model in MODELS if model in results},
        "right": references(out),
    }


def mean(found: list[dict[str, Any]], key: str) -> float:
    """The mean over a set's runs: minutes, or the accuracy of a model or reference over all held-out images."""
    if key in MODELS:
        return float(np.mean([run["accuracy"].get(key, math.nan) for run in found]))
    if key in found[0]["right"]:
        return float(np.concatenate([run["right"][key] for run in found]).mean())
    return float(np.mean([run[key] for run in found]))


def above_probe(found: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy of the student minus that of its probe, and the standard error, paired over the images."""
    gains = [np.subtract(run["right"]["student"], run["right"]["probe"]) for run in found]
    gain_Q = np.concatenate(gains).astype(float)
    return float(gain_Q.mean()), float(gain_Q.std() / math.sqrt(len(gain_Q)))


def row(found: list[dict[str, Any]]) -> str:
    """The runs of a set as a row of the table."""
    minutes = [f"{mean(found, key):.1f}" for key in ("asked", "predicted", "clock", "processors")]
    shares = [f"{mean(found, key):.1%}" for key in (*MODELS, "probe", "best_probe", "frequent")]
    gain, error = above_probe(found)
    shares.insert(-2, f"{100 * gain:+.1f} ± {100 * error:.1f}")
    held = sum(len(run["right"]["student"]) for run in found)
    name = f"{found[0]['name']}, {held:,} held out by {len(found)} seed{'s' * (len(found) > 1)}"
    return f"| {' | '.join([name, *minutes, *shares])} |"


def faults(found: list[dict[str, Any]]) -> list[str]:
    """The promises of ``init`` that the runs of a set break."""
    gain, error = above_probe(found)
    said = []
    if gain < -ERRORS * error:
        said.append(
            f"the student is below its linear probe: {gain:+.1%}, standard error {error:.1%}"
        )
    if mean(found, "student") < mean(found, "frequent"):
        said.append("the student is below the most frequent class")
    for run in found:
        if run["processors"] > LATE * run["asked"]:
            said.append(
                f"seed {run['seed']} took {run['processors']:.1f} minutes of the processors"
            )
    return said


def main() -> None:
    """Run the trials and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "sets", nargs="*", metavar="SET", help=f"one of {', '.join(SETS)}; default: all"
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument(
        "--idle", action="store_true", help="pass --idle to init, if this machine is busy"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each set")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ["CNN2GNN_DATA"])
    wrong = []
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS))))
    for name in given.sets or SETS:
        options = ["--idle"] * given.idle
        found = trial(name, given.folder.resolve(), data, given.minutes, given.seeds, options)
        print(row(found), flush=True)
        wrong += [f"{name}: {fault}" for fault in faults(found)]
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
