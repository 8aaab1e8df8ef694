"""Whether a stem that was trained for sets answers sets better than one trained with cross-entropy alone.

    python benchmarks/set_stem.py FOLDER --data mini-imagenet --seeds 0 1
    python benchmarks/set_stem.py FOLDER --data cifar10:cat,ship

The small student of ``memory.py`` is trained for 8 epochs; up to the sixth all ways are the same run, then each
sees as many images in as many steps:

    plain          cross-entropy of random images, as before
    compositions   half of each batch are sets of 4 to 32 training images (``compositions.py``); cross-entropy
    set network    the same batches; plus λ · (loss of the set network, back-propagated through the stem)
    pairs          the same batches; plus λ · (cross-entropy of two images of a set being of one class)

The other half of a batch stays random, since sets of one class would otherwise distort BatchNorm's statistics, which
are computed anew from random training images at the end, for all ways. The set network starts as the product would
fit it on training images of the sixth epoch. λ is chosen on calibration images of the first seed (fitted on one half,
judged on the other), never on test images. Then, for each way, ``LearnedSets.fit`` on the calibration images, and
points gained on sets of test images. Prints Markdown. Everything is kept in FOLDER, and a second call continues;
what was made from other data, epochs or code is made again. Needs $CNN2GNN_DATA.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from dataclasses import dataclass
from inspect import getfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kept_files import digest, made_from
from remembering import features, sets
from remembering.additions import unit
from torch import nn

from cnn2gnn_dist.inference.calibration import fit_temperature
from cnn2gnn_dist.inference.sets.compositions import SHARES, Kind, draw
from cnn2gnn_dist.inference.sets.learned import RELATED_WEIGHT, LearnedSets
from cnn2gnn_dist.inference.sets.related import rows_by_class
from cnn2gnn_dist.models.student import Student, StudentOutput

SIZES = (4, 6, 8, 11, 16, 23, 32)
IN_SETS = features.BATCH // 2
"""At most so many images of a batch are in sets."""
STARTED, RATE, CLIPPED = 4000, 0.01, 1.0
"""The set network: training images it is first fitted on; its learning rate, which falls to 0; largest gradient."""
STANDARDIZED, CENTERED = 20, 10_000
"""Batches from which BatchNorm's statistics are computed anew; training images of which the mean x is taken."""
JUDGED = tuple((m, k) for m, k in sets.SETS if m <= 16)
"""Kinds of sets by which λ is chosen."""


@dataclass(frozen=True)
class Way:
    """How the last epochs are trained: ``objective`` beside cross-entropy, with weight ``strength``."""

    objective: str
    strength: float = 0.0

    def __str__(self) -> str:
        return f"{self.objective} {self.strength:g}" if self.strength else self.objective


class Training:
    """A student in training, whose state can be kept and taken up again."""

    def __init__(self, images: features.Images, epochs: int, seed: int) -> None:
        self.seed, self.steps = seed, len(images.labels["train"]) // features.BATCH
        self.student = features.network(images, seed)
        self.optimizer, self.schedule = features.optimization(self.student, epochs * self.steps)
        self.pixels = torch.from_numpy(images.pixels["train"]).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(images.labels["train"])

    def state(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("student", "optimizer", "schedule")}
        return {n: p.state_dict() for n, p in parts.items()} | {"random": torch.get_rng_state()}

    def resume(self, state: dict[str, Any]) -> None:
        for name in ("student", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])

    def run(self, epochs: int, in_sets: InSets | None = None) -> float:
        """Train on; seconds of processor time."""
        started = time.process_time()
        for epoch in range(epochs):
            order, total = torch.randperm(len(self.labels)), 0.0
            for rows in order[: self.steps * features.BATCH].split(features.BATCH):
                drawn = None if in_sets is None else in_sets.draw()
                if drawn is not None:
                    rows = mixed(rows, drawn[0])
                out, loss = features.answered(self.student, self.pixels[rows], self.labels[rows])
                total += float(loss.detach()) / 2 / self.steps
                if in_sets is not None and drawn is not None:
                    loss = loss + in_sets.loss(out, self.labels[rows], *drawn)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                if in_sets is not None:
                    in_sets.step()
            told = "" if in_sets is None else in_sets.report()
            seconds = time.process_time() - started
            print(
                f"  epoch {epoch + 1}: cross-entropy {total:.3f}, {seconds:.0f} s {told}",
                flush=True,
            )
        if not all(torch.isfinite(value).all() for value in self.student.parameters()):
            raise FloatingPointError("the student has weights that are not finite")
        return time.process_time() - started

    @torch.no_grad()
    def finish(self) -> Student:
        """The student, with BatchNorm's statistics of random training images."""
        norms = [
            m for m in self.student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over batches
        torch.manual_seed(self.seed)
        order = torch.randperm(len(self.labels))[: STANDARDIZED * features.BATCH]
        for rows in order.split(features.BATCH):
            features.answered(self.student, self.pixels[rows], self.labels[rows])
        return self.student.eval()


class InSets:
    """Batches with sets in them, and the loss of a way on these.

    The set network and the edges' odds start as fitted on training images, and learn together with the stem.
    """

    def __init__(
        self, training: Training, images: features.Images, way: Way, steps: int, start: Path
    ) -> None:
        self.way, self.rng = way, np.random.default_rng([training.seed, 1])
        self.of_class = rows_by_class(images.labels["train"])
        self.total, self.count = 0.0, 0
        if way.objective == "compositions":
            return
        if not start.exists():
            kept = computed(training.student.eval(), images, STARTED, ())
            training.student.train()
            logits, labels = kept["train/logits"], kept["train/labels"]
            fitted = LearnedSets.fit(logits, centered(kept, "train"), labels)
            start.write_text(json.dumps(fitted.to_json()))
        fitted = LearnedSets.from_json(json.loads(start.read_text()))
        self.temperature, self.network = fitted.temperature, fitted.network.float().train()
        self.odds = nn.Parameter(torch.tensor([fitted.odds.slope, fitted.odds.offset]))
        self.learned = [self.odds, *self.network.parameters()]
        if way.objective == "pairs":
            self.learned = [self.odds]
        self.optimizer = torch.optim.Adam(self.learned, lr=RATE)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, steps)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows [S, m] of training images in sets of one size, and which sets are related [S]."""
        count = int(self.rng.choice(SIZES))
        kinds = self.rng.choice(list(SHARES), IN_SETS // count, p=list(SHARES.values()))
        drawn = [draw(self.of_class, count, Kind(kind), self.rng) for kind in kinds]
        related = np.array([kind is not Kind.STRANGERS for _, kind in drawn])
        return np.stack([rows for rows, _ in drawn]), related

    def loss(
        self,
        out: StudentOutput,
        labels: torch.Tensor,
        members: np.ndarray,
        related: np.ndarray,
    ) -> torch.Tensor:
        """The way's loss on the sets at the end of a batch, times its strength."""
        if self.way.objective == "compositions":
            return torch.zeros(())
        shape, random = members.shape, len(labels) - members.size
        x = out.x_BD.float()
        z = F.normalize(x[random:] - x[:random].mean(0), dim=1).unflatten(0, shape)
        log_odds = self.odds[0] * (z @ z.transpose(1, 2)) + self.odds[1]
        labels = labels[random:].unflatten(0, shape)
        if self.way.objective == "pairs":
            loss = pair_loss(log_odds, labels)
        else:
            logits = out.self_logits_BC[random:].float() / self.temperature
            answers = self.network(logits.log_softmax(1).unflatten(0, shape), log_odds)
            loss = set_loss(*answers, labels, torch.from_numpy(related))
        self.total, self.count = self.total + float(loss.detach()), self.count + 1
        return self.way.strength * loss

    def step(self) -> None:
        """Update what isn't the student's."""
        if self.way.objective != "compositions":
            nn.utils.clip_grad_norm_(self.learned, CLIPPED)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()

    def report(self) -> str:
        """The mean loss on sets since the last report."""
        if not self.count:
            return ""
        mean, self.total, self.count = self.total / self.count, 0.0, 0
        return f"{self.way.objective} {mean:.3f}, odds {self.odds.tolist()}"


def mixed(rows: torch.Tensor, members: np.ndarray) -> torch.Tensor:
    """The random rows of a batch, of which the last make room for those of sets."""
    return torch.cat([rows[: len(rows) - members.size], torch.from_numpy(members.ravel())])


def set_loss(
    log_q_SmC: torch.Tensor, score_S: torch.Tensor, labels_Sm: torch.Tensor, related_S: torch.Tensor
) -> torch.Tensor:
    """The product's: cross-entropy of each image's class, and of being related."""
    loss = F.nll_loss(log_q_SmC.flatten(0, 1), labels_Sm.flatten())
    of_related = F.binary_cross_entropy_with_logits(score_S, related_S.float())
    return loss + RELATED_WEIGHT * of_related


def pair_loss(log_odds_Smm: torch.Tensor, labels_Sm: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of two images of a set being of one class; pairs of one class and of two weigh the same."""
    first, second = torch.triu_indices(*log_odds_Smm.shape[1:], 1)
    log_odds = log_odds_Smm[:, first, second]
    same = labels_Sm[:, first] == labels_Sm[:, second]
    loss = F.binary_cross_entropy_with_logits(log_odds, same.float(), reduction="none")
    return sum((loss[kind].mean() for kind in (same, ~same) if kind.any()), torch.zeros(())) / 2


def computed(
    student: Student, images: features.Images, count: int, others: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Features of so many training images and of other parts."""
    rows = np.random.default_rng(0).permutation(len(images.labels["train"]))[:count]
    pixels = {"train": images.pixels["train"][rows]} | {p: images.pixels[p] for p in others}
    labels = {"train": images.labels["train"][rows]} | {p: images.labels[p] for p in others}
    return features.features(student, features.Images(images.classes, images.old, pixels, labels))


def centered(kept: dict[str, np.ndarray], part: str) -> np.ndarray:
    return unit(kept[f"{part}/x"] - kept["train/x"].mean(0))


@functools.cache
def code_and_data(which: str) -> str:
    """Digest of the images of a data set, and of the modules that make features from them."""
    code = [Path(__file__), *(Path(getfile(one)) for one in (unit, fit_temperature))]
    code += Path(getfile(LearnedSets)).parent.glob("*.py")
    return digest(features.made_by(Path(os.environ["CNN2GNN_DATA"]), which), files=code)


def trained(
    images: features.Images, given: argparse.Namespace, seed: int, way: Way
) -> dict[str, np.ndarray]:
    """Features of a student trained so, kept in the folder, and ``seconds`` of processor time of the last epochs."""
    shared = given.folder / f"{given.data.replace(':', '-').replace(',', '-')}-{seed}.pt"
    file = shared.with_name(f"{shared.stem}-{str(way).replace(' ', '-')}.npz")
    source = digest(code_and_data(given.data), given.epochs, given.last, seed)
    with made_from(source, file) as missing:
        if missing:
            print(f"seed {seed}, {way}", flush=True)
            kept = trained_on(shared, images, given, seed, way, source)
            np.savez(file.with_suffix(".part.npz"), **kept)
            file.with_suffix(".part.npz").rename(file)
    with np.load(file) as kept_there:
        return dict(kept_there)


def trained_on(
    shared: Path,
    images: features.Images,
    given: argparse.Namespace,
    seed: int,
    way: Way,
    source: str,
) -> dict[str, np.ndarray]:
    """As ``trained``, from the state in ``shared``, with which all ways start: also made from ``source``."""
    training, start = Training(images, given.epochs, seed), shared.with_suffix(".json")
    with made_from(source, shared) as missing:
        if missing:
            start.unlink(missing_ok=True)  # it is fitted on this state
            training.run(given.epochs - given.last)
            torch.save(training.state(), shared.with_suffix(".part"))
            shared.with_suffix(".part").rename(shared)
    # Resumed even when just written, so that all ways start from the same bits.
    training.resume(torch.load(shared))
    steps = given.last * training.steps
    in_sets = None if way.objective == "plain" else InSets(training, images, way, steps, start)
    seconds = training.run(given.last, in_sets)
    kept = computed(training.finish(), images, CENTERED, ("calibration", "test"))
    for column in ("train/logits", "calibration/z", "test/z", "train/z"):
        kept.pop(column)
    return kept | {"seconds": np.array(seconds)}


def on_calibration(kept: dict[str, np.ndarray], count: int) -> float:
    """Accuracy of sets of one half of the calibration images, as learned from the other; a mean over kinds."""
    logits, z = kept["calibration/logits"], centered(kept, "calibration")
    labels = kept["calibration/labels"]
    second = halved(labels)
    learned = LearnedSets.fit(logits[~second], z[~second], labels[~second])
    half = logits[second], z[second], labels[second]
    rows = sets.gains(learned, {}, *half, count, JUDGED)
    return float(np.mean([float(row["alone"]) + float(row["learned"]) for row in rows]))


def halved(labels_n: np.ndarray) -> np.ndarray:
    """Every second image of each class: bool [n]."""
    second_n = np.zeros(len(labels_n), bool)
    for rows in rows_by_class(labels_n):
        second_n[rows[1::2]] = True
    return second_n


def on_test(kept: dict[str, np.ndarray], count: int) -> dict[str, Any]:
    """Accuracy alone, processor time, and a row for each kind of set."""
    logits, z, labels = kept["test/logits"], centered(kept, "test"), kept["test/labels"]
    of = kept["calibration/logits"], centered(kept, "calibration"), kept["calibration/labels"]
    learned = LearnedSets.fit(*of)
    mean: sets.Answer = lambda logits, z: learned.same(logits).posterior_mC.argmax(1)  # noqa: E731
    rows = sets.gains(learned, {"mean": mean}, logits, z, labels, count)
    alone = 100 * float((logits.argmax(1) == labels).mean())
    return {"alone": alone, "seconds": float(kept["seconds"]), "rows": rows}


def average(judged: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several seeds."""
    rows = []
    for same in zip(*(each["rows"] for each in judged), strict=True):
        columns = [column for column in same[0] if column != "set"]
        means = {column: float(np.mean([row[column] for row in same])) for column in columns}
        rows.append({"set": same[0]["set"]} | means)
    means = {name: float(np.mean([each[name] for each in judged])) for name in ("alone", "seconds")}
    return means | {"rows": rows}


def show(judged: dict[Way, dict[str, Any]], title: str) -> None:
    """A table: a column for each way."""
    print(f"\n{title}: points gained on sets of test images (and accuracy answered together)\n")
    print("| images, classes | " + " | ".join(map(str, judged)) + " |")
    print("| --- |" + " --- |" * len(judged))
    for name, key in (("alone, all test images", "alone"), ("seconds", "seconds")):
        print(f"| {name} | " + " | ".join(f"{each[key]:.1f}" for each in judged.values()) + " |")
    for rows in zip(*(each["rows"] for each in judged.values()), strict=True):
        cells = [f"{row['learned']:.2f} ({row['alone'] + row['learned']:.1f})" for row in rows]
        print(f"| {rows[0]['set']} | " + " | ".join(cells) + " |")
    for rows in zip(*(each["rows"] for each in judged.values()), strict=True):
        if rows[0]["set"] in ("2, 1", "4, 1", "8, 1", "16, 1"):
            cells = [f"{row['mean']:.2f} ({row['alone'] + row['mean']:.1f})" for row in rows]
            print(f"| {rows[0]['set']}, declared | " + " | ".join(cells) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where students and figures are kept")
    parser.add_argument("--data", default="mini-imagenet", help="or cifar10:NEW,NEW")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--last", type=int, default=3, help="epochs in which ways differ")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 1.0], help="λ to try")
    parser.add_argument("--count", type=int, default=400, help="sets of each kind")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = Path(os.environ["CNN2GNN_DATA"])
    if given.data == "mini-imagenet":
        images = features.mini_imagenet(data)
    else:
        images = features.cifar10(data, given.data.partition(":")[2].split(","))
    print(f"{given.data}: {len(images.labels['train'])} training images", flush=True)
    ways = [Way("plain"), Way("compositions")]
    trained(images, given, given.seeds[0], ways[0])
    for objective in ("set network", "pairs"):
        found = {}
        for way in (Way(objective, strength) for strength in given.strengths):
            kept = trained(images, given, given.seeds[0], way)
            found[way] = on_calibration(kept, given.count // 2) if len(given.strengths) > 1 else 0
            print(f"{way}: {found[way]:.2f} % on calibration images", flush=True)
        ways.append(max(found, key=lambda way: found[way]))
    of_seed = []
    for seed in given.seeds:
        judged = {w: on_test(trained(images, given, seed, w), given.count) for w in ways}
        show(judged, f"seed {seed}")
        of_seed.append(judged)
        kept_as = {str(way): each for way, each in judged.items()}
        (given.folder / f"figures-{seed}.json").write_text(json.dumps(kept_as, indent=1))
    if len(of_seed) > 1:
        show({w: average([judged[w] for judged in of_seed]) for w in ways}, "mean over seeds")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
