"""Muon or SGD for the teacher of the short CIFAR-10 recipe: accuracy for equal time on one core.

    OMP_NUM_THREADS=1 python benchmarks/optimizers.py FOLDER --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/optimizers.py FOLDER --seeds 0 --longer 12    (more epochs, too)

The teacher is trained in this process, in a plain loop without DeepSpeed, from the product's own parts: network and
whitened first layer, order, views, early size, micro-batches, loss, groups of parameters, schedule, lookahead. Only the
update of the convolutions' filters differs:

    sgd     the recipe's: SGD with Nesterov's momentum; the grid is over its rate
    muon    torch's Muon (K. Jordan et al., 2024), the filters of a convolution as a matrix [out, in * 3 * 3]: momentum,
            then five steps of Newton and Schulz towards the nearest orthogonal matrix. As in airbench94_muon, their
            norm is set to √out before each step; biases and classifier keep the recipe's SGD. The grid is over its
            rate; then each of VARIANTS is tried at the best one

Rates and variants are chosen with seed 0 by the accuracy on 2,000 training images that are set apart, none by the test
images. Every training is a line of ``trials.jsonl``; run again, the script continues with what is missing, or was made
with another recipe, other images or other code. It prints a table of all trials, and one of the two that were chosen:
accuracy over the seeds, processor seconds per epoch, and the optimizer's share of them (its steps alone, not the
lookahead).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from inspect import getfile
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from kept_files import add_line, digest, lines_made_from
from remembering.features import read
from torch import Tensor, nn

from cnn2gnn_dist import settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.images.views import ViewSpec, shifted
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.models.losses import distillation_loss
from cnn2gnn_dist.models.normalise import shrunk
from cnn2gnn_dist.models.whitened_cnn import WhitenedCNN
from cnn2gnn_dist.stages.shared.learning_rates import rates_of
from cnn2gnn_dist.stages.shared.networks import Teacher
from cnn2gnn_dist.stages.shared.scheduled_values import rate_at, share_kept
from cnn2gnn_dist.stages.shared.whitening import IMAGES
from cnn2gnn_dist.training.accumulation import accumulation_for
from cnn2gnn_dist.training.average import MOMENTS, Average, create_state
from cnn2gnn_dist.training.parameter_groups import parameter_groups
from cnn2gnn_dist.training.precision import choose
from cnn2gnn_dist.training.schedule import size_at

RECIPE = str(Path(__file__).parent / "recipes" / "cifar10_short.yaml")
CLASSES, APART = 10, 200
"""Classes of CIFAR-10, and training images of each that are set apart."""
SGD_RATES = (0.375, 0.75, 1.5)
MUON_RATES = (0.06, 0.12, 0.24, 0.48)
VARIANTS: dict[str, dict[str, float | bool]] = {
    "momentum": {"momentum": 0.85},  # SGD's
    "norms": {"normalized": False},
    "average": {"averaged": False},
}
Seconds = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One training: what differs between them.

    Attributes:
        optimizer: sgd or muon.
        lr: peak rate; that of the filters alone with muon.
        momentum: likewise.
        normalized: muon: the filters' norm is set to √out before each step.
        averaged: with the recipe's lookahead.
    """

    optimizer: str
    lr: float
    momentum: float
    normalized: bool
    averaged: bool
    epochs: int
    seed: int


@dataclass
class Images:
    """Clean pixels uint8 [N, S, S, 3] and labels int64 [N] of ``train``, ``apart`` and ``test``."""

    pixels: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def read_images(folder: Path, size: int) -> Images:
    """CIFAR-10, with ``APART`` training images of each class set apart, always the same ones."""
    pixels_N, labels_N, _ = read(sorted(folder.glob("train*.parquet")), size)
    test_pixels_N, test_labels_N, _ = read(sorted(folder.glob("test*.parquet")), size)
    apart_N = set_apart(labels_N)
    return Images(
        {"train": pixels_N[~apart_N], "apart": pixels_N[apart_N], "test": test_pixels_N},
        {"train": labels_N[~apart_N], "apart": labels_N[apart_N], "test": test_labels_N},
    )


def set_apart(labels_N: np.ndarray) -> np.ndarray:
    """[N] bool: the ``APART`` images of each class that rates are chosen by."""
    rng, chosen_N = np.random.default_rng(0), np.zeros(len(labels_N), bool)
    for c in range(CLASSES):
        chosen_N[rng.permutation(np.flatnonzero(labels_N == c))[:APART]] = True
    return chosen_N


class Update:
    """The optimizers of one training, and the lookahead over all that they move.

    Args:
        model: whose convolutions' filters muon moves, as matrices that share their memory.
        config: with the recipe.
        trial: the rest.
    """

    def __init__(self, model: Teacher, config: Config, trial: Trial) -> None:
        self.recipe, self.trial = config.teacher, trial
        groups = parameter_groups(model, self.recipe.weight_decay, (), rates_of(model, self.recipe))
        self.filters: list[tuple[Tensor, nn.Parameter]] = []
        if trial.optimizer == "muon":
            for group in groups:
                filters = [p for p in group["params"] if p.ndim == 4]
                self.filters += [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in filters]
                group["params"] = [p for p in group["params"] if p.ndim != 4]
            groups = [group for group in groups if group["params"]]
        momentum = self.recipe.momentum if self.filters else trial.momentum
        self.sgd = torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=True)
        self.optimizers: list[torch.optim.Optimizer] = [self.sgd]
        if self.filters:
            matrices = [matrix for _, matrix in self.filters]
            self.muon = torch.optim.Muon(matrices, momentum=trial.momentum, weight_decay=0.0)
            self.optimizers.append(self.muon)
        self.averages: list[Average] = []
        if trial.averaged:
            for optimizer, module in zip(self.optimizers, (model, nn.Module()), strict=False):
                create_state(optimizer, 0, MOMENTS["SGD"], 0.0, True)
                self.averages.append(Average("lookahead", optimizer, 0, module))

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Move the weights; ``share`` of the peak rates."""
        peak = self.recipe.lr if self.filters else self.trial.lr
        for group in self.sgd.param_groups:
            group["lr"] = peak * share * group["rate"]
        self.sgd.step()
        if not self.filters:
            return
        self.muon.param_groups[0]["lr"] = self.trial.lr * share
        for weight, matrix in self.filters:
            assert weight.grad is not None
            matrix.grad = weight.grad.reshape(len(weight), -1)
            if self.trial.normalized:
                matrix.mul_(len(matrix) ** 0.5 / matrix.norm())
        self.muon.step()

    def average(self, kept: float | None) -> None:
        """Update the lookahead, if it is due."""
        for average in self.averages if kept is not None else ():
            average.update(kept)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Within this block the weights are the averaged ones."""
        for average in self.averages:
            average.swap()
        yield
        for average in self.averages:
            average.swap()


def initial(config: Config, images: Images) -> Teacher:
    """The network before training: the same for every optimizer."""
    torch.manual_seed(config.seed)
    model = Teacher(config, CLASSES)
    model.compute_dtype = choose(config.precision, "cpu", {})
    rows = np.unique(np.linspace(0, len(images.labels["train"]) - 1, IMAGES).astype(np.int64))
    seen = model.normalise(torch.from_numpy(images.pixels["train"][rows]))
    for module in model.modules():
        if isinstance(module, WhitenedCNN):
            module.whiten(seen)
    return model


def views_of(config: Config) -> ViewSpec:
    """The recipe's random views."""
    v = config.views
    return ViewSpec(
        v.kind,
        v.size,
        seed=config.seed,
        pad=v.pad,
        reflect=v.padding == "reflect",
        alternating=v.flip == "alternating",
    )


def train(config: Config, trial: Trial, images: Images) -> dict[str, float]:
    """Train and evaluate; return accuracies (``apart``, ``test``), the last epoch's loss and ``Seconds``."""
    recipe, spec = config.teacher, views_of(config)
    model = initial(config, images)
    update = Update(model, config, trial)
    pixels, labels = images.pixels["train"], torch.from_numpy(images.labels["train"])
    shards = [
        len(rows)
        for rows in np.array_split(labels.numpy(), -(-len(labels) // config.data.shard_size))
    ]
    order = Order(
        np.array(shards),
        seed=config.seed,
        global_batch=recipe.global_batch,
        window=config.stream.window,
    )
    steps, parts = (
        order.batches_per_epoch,
        accumulation_for(recipe.global_batch, 1, recipe.max_micro_batch),
    )
    spent: Seconds = {"all": 0.0, "optimizer": 0.0}
    loss_sum = torch.zeros(())
    model.train()
    for epoch in range(recipe.epochs):
        size = size_at(
            epoch, recipe.epochs, config.views.size, recipe.early_size, recipe.early_share
        )
        loss_sum.zero_()
        with timed(spent, "all"):
            for index in range(steps):
                model.zero_grad()
                for ids in order.micro_batches(epoch, index, 0, 1, parts):
                    seen = shifted(spec, pixels[ids], ids, epoch)
                    logits = model(shrunk(torch.from_numpy(seen), size))
                    loss = smoothed_loss(logits, labels[ids], recipe.label_smoothing) / parts
                    loss.backward()
                    loss_sum += loss.detach()
                progress = epoch + (index + 1) / steps
                with timed(spent, "optimizer"):
                    update.step(rate_at(recipe, progress, 0.0) / recipe.lr)
                update.average(share_kept(recipe, progress, epoch * steps + index + 1))
    model.eval()
    with update.answering():
        found = {part: accuracy(model, images, part) for part in ("apart", "test")}
    per_epoch = {f"{name}_s": value / recipe.epochs for name, value in spent.items()}
    return {**found, "loss": float(loss_sum) / steps, **per_epoch}


@contextmanager
def timed(spent: Seconds, name: str) -> Iterator[None]:
    """Add the processor seconds of this block."""
    began = time.process_time()
    yield
    spent[name] += time.process_time() - began


def smoothed_loss(logits_BC: Tensor, labels_B: Tensor, smoothing: float) -> Tensor:
    """The teacher's cross-entropy, the mean over a micro-batch."""
    return distillation_loss(
        logits_BC, labels_B, None, weight=0.0, temperature=1.0, label_smoothing=smoothing
    ).mean()


@torch.no_grad()
def accuracy(model: Teacher, images: Images, part: str) -> float:
    """Percentage of a part's clean images that the model answers right."""
    right = 0
    for start in range(0, len(images.labels[part]), 500):
        seen = torch.from_numpy(images.pixels[part][start : start + 500])
        truth = images.labels[part][start : start + 500]
        right += int((model(seen).argmax(1).numpy() == truth).sum())
    return 100 * right / len(images.labels[part])


def made_by(recipe: str, data: Path) -> str:
    """Digest of what a trial doesn't say: the recipe, the images in a folder, and the code that trains."""
    tree = settings.as_tree(settings.load(recipe))
    own = [tree[name] for name in ("teacher", "views", "stream", "precision")]
    folders = [Path(getfile(one)).parent for one in (Teacher, WhitenedCNN, Average)]
    code = [Path(__file__), *(Path(getfile(one)) for one in (read, shifted, Order))]
    code += [one for folder in folders for one in folder.glob("*.py")]
    return digest(own, tree["data"]["shard_size"], files=[*data.glob("*.parquet"), *code])


class Trials:
    """Trainings, each made once.

    Args:
        file: a line of JSON for each that is done. Those made from something else don't count, but stay.
        source: what they are made from (``made_by``).
        recipe: preset or file.
        images: of the data set.
    """

    def __init__(self, file: Path, source: str, recipe: str, images: Images) -> None:
        self.file, self.source, self.recipe, self.images = file, source, recipe, images
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = lines_made_from(source, file)
        self.done = {Trial(**line["trial"]): line["found"] for line in lines}

    def __call__(self, trial: Trial) -> dict[str, float]:
        """What a training gives, as ``train`` returns it."""
        if trial not in self.done:
            options = [f"seed={trial.seed}", f"teacher.epochs={trial.epochs}"]
            found = train(settings.load(self.recipe, options), trial, self.images)
            add_line(self.source, self.file, {"trial": asdict(trial), "found": found})
            self.done[trial] = found
            print(row(trial, found), flush=True)
        return self.done[trial]


def best(trials: list[Trial], run: Callable[[Trial], dict[str, float]]) -> Trial:
    """The trial with the best accuracy on the images set apart; of equal ones the first."""
    return max(trials, key=lambda trial: run(trial)["apart"])


def chosen(
    given: argparse.Namespace, run: Callable[[Trial], dict[str, float]]
) -> tuple[Trial, Trial]:
    """SGD at its best rate, and muon at its best rate in its best variant, of those given."""
    teacher = settings.load(given.recipe).teacher
    sgd = Trial("sgd", teacher.lr, teacher.momentum, False, True, teacher.epochs, 0)
    muon = replace(sgd, optimizer="muon", momentum=0.6, normalized=True)  # airbench94_muon's
    rate = best([replace(muon, lr=lr) for lr in given.muon], run)
    variants = [rate, *(replace(rate, **VARIANTS[name]) for name in given.variants)]
    return best([replace(sgd, lr=lr) for lr in given.sgd], run), best(variants, run)


def row(trial: Trial, found: dict[str, float]) -> str:
    """A line of the table of trials."""
    kind = f"{trial.optimizer}, lr {trial.lr:g}, momentum {trial.momentum:g}"
    kind += ", normalized" * trial.normalized + ", no lookahead" * (not trial.averaged)
    share = found["optimizer_s"] / found["all_s"]
    return (
        f"| {kind} | {trial.epochs} | {trial.seed} | {found['apart']:.2f} | {found['test']:.2f} | "
        f"{found['loss']:.3f} | {found['all_s']:.1f} | {share:.1%} |"
    )


def summary(trial: Trial, seeds: list[int], run: Callable[[Trial], dict[str, float]]) -> str:
    """A line of the table over the seeds."""
    found = [run(replace(trial, seed=seed)) for seed in seeds]
    tests = [one["test"] for one in found]
    spread = f" ± {stdev(tests):.2f}" if len(tests) > 1 else ""
    spent, steps = (mean(one[name] for one in found) for name in ("all_s", "optimizer_s"))
    return (
        f"| {trial.optimizer}, lr {trial.lr:g} | {trial.epochs} | {mean(tests):.2f}{spread} | "
        f"{', '.join(f'{one:.2f}' for one in tests)} | {spent:.1f} | {steps / spent:.1%} |"
    )


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default=RECIPE, help="preset or file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--longer", type=int, help="epochs of another training of both, with the first seed"
    )
    parser.add_argument("--sgd", type=float, nargs="+", default=SGD_RATES, metavar="RATE")
    parser.add_argument("--muon", type=float, nargs="+", default=MUON_RATES, metavar="RATE")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    size = settings.load(given.recipe).views.size
    data = Path(os.environ["CNN2GNN_DATA"]) / "cifar10"
    source = made_by(given.recipe, data)
    run = Trials(given.folder / "trials.jsonl", source, given.recipe, read_images(data, size))
    print("| trial | epochs | seed | set apart % | test % | loss | s / epoch | optimizer |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for trial, found in run.done.items():
        print(row(trial, found))
    pair = chosen(given, run)
    for seed in given.seeds:  # in turns: the load of the machine changes
        for trial in pair:
            run(replace(trial, seed=seed))
    lines = [summary(trial, given.seeds, run) for trial in pair]
    if given.longer:
        longer = [replace(trial, epochs=given.longer) for trial in pair]
        lines += [summary(trial, given.seeds[:1], run) for trial in longer]
    print("\n| | epochs | test % | seeds | s / epoch | optimizer |")
    print("| --- | --- | --- | --- | --- | --- |", *lines, sep="\n")


if __name__ == "__main__":
    main()
