"""Views for few images: is the student below a linear probe of its own features?

    python benchmarks/few_images.py FOLDER [black mirrored black+augment mirrored+augment] [--epochs 51] [--folds 5]

FOLDER has a folder for each class (``benchmarks/first_config.py`` makes such folders). Each image is held out once.
For every fold and each of ``KINDS``, teacher and student (without a graph) of the smallest pair of ``cnn2gnn init`` are
trained in this process, as the stages do it, on views of 32 pixels. It prints a row for each kind: accuracies of
teacher, student and the best of three linear probes per fold, and the differences of the student from that probe and
from the student of the first kind, each with its standard error over the images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from first_config import STRENGTHS
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from cnn2gnn_dist import settings
from cnn2gnn_dist.commands.init import recipe
from cnn2gnn_dist.data.images.decode import decode
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, render_batch, shifted
from cnn2gnn_dist.models.losses import distillation_loss
from cnn2gnn_dist.models.precision import MixedPrecision
from cnn2gnn_dist.stages.shared.networks import Teacher, build_student
from cnn2gnn_dist.training.precision import choose
from cnn2gnn_dist.training.schedule import lr_at

KINDS: dict[str, dict[str, Any]] = {
    "black": {},
    "mirrored": {"reflect": True},
    "black+augment": {"randaugment": 1},
    "mirrored+augment": {"reflect": True, "randaugment": 1},
}
SIZE, PAD, LR, WARM, DECAY = 32, 4, 0.002, 2.0, 0.05
Loss = Callable[[torch.Tensor, np.ndarray], torch.Tensor]


def train(
    model: MixedPrecision, views: Callable[[int], np.ndarray], loss_of: Loss, epochs: int, seed: int
) -> None:
    """Train by AdamW with warm-up and cosine; ``views``: epoch → images, ``loss_of``: images, their rows → loss."""
    model.compute_dtype = choose("auto", "cpu", {})
    groups = [[p for p in model.parameters() if (p.ndim > 1) == whole] for whole in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": g, "weight_decay": d} for g, d in zip(groups, (DECAY, 0.0), strict=True)]
    )
    rng = np.random.default_rng(seed)
    model.train()
    for epoch in range(epochs):
        images = views(epoch)
        size = recipe.batch(len(images))
        order, steps = rng.permutation(len(images)), len(images) // size
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            for group in optimizer.param_groups:
                group["lr"] = lr_at(epoch + step / steps, epochs, LR, min(WARM, epochs / 2))
            optimizer.zero_grad()
            loss_of(torch.from_numpy(images[rows]), rows).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()


def answers(
    images: list[np.ndarray], labels_N: np.ndarray, held: np.ndarray, kind: str, epochs: int
) -> dict[str, np.ndarray]:
    """Which held-out images the teacher, the student and the best probe of the student's features get right."""
    mine, classes = np.setdiff1d(np.arange(len(labels_N)), held), int(labels_N.max()) + 1
    spec = ViewSpec("crop_flip", SIZE, pad=PAD, fill=(128, 128, 128), **KINDS[kind])
    clean = render_batch(spec, images, np.arange(len(images)), CLEAN)
    pixels = clean[mine].reshape(-1, 3) / 255
    moments = {"mean": pixels.mean(0).tolist(), "std": pixels.std(0).tolist()}
    config = settings.check(
        {
            "name": "x",
            "data": {"source": "shards", "train": "/x"},
            "views": {"size": SIZE, **moments},
            "teacher": recipe._TEACHERS[0],
            "student": {**recipe._STEMS[0], "dim": 64, "hidden": 64},
        }
    )
    truth = torch.from_numpy(labels_N[mine])
    own, unseen = torch.from_numpy(clean[mine]), torch.from_numpy(clean[held])
    torch.manual_seed(int(held[0]))
    teacher, student = (
        Teacher(config, classes, initial=False),
        build_student(config, classes, "none"),
    )

    def views(first: int) -> Callable[[int], np.ndarray]:
        return lambda epoch: shifted(spec, clean[mine], mine, first + epoch)

    train(
        teacher, views(0), lambda x, rows: F.cross_entropy(teacher(x).float(), truth[rows]), epochs, 1
    )  # fmt: skip
    with torch.no_grad():
        soft = F.log_softmax(teacher(own).float(), 1)

    def distilled(x: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        return distillation_loss(
            student(x).logits_BC, truth[rows], soft[rows], weight=recipe._DISTILL, temperature=2.0
        ).mean()

    train(student, views(10_000), distilled, int(recipe._STUDENT_EPOCHS * epochs), 2)
    with torch.no_grad():
        seen, found, taught = student(own), student(unseen), teacher(unseen)
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
        .fit(seen.x_BD.float().numpy(), labels_N[mine])
        .predict(found.x_BD.float().numpy())
        == labels_N[held]
        for strength in STRENGTHS
    ]
    return {
        "teacher": taught.argmax(1).numpy() == labels_N[held],
        "student": found.logits_BC.argmax(1).numpy() == labels_N[held],
        "probe": max(probes, key=np.count_nonzero),
    }


def main() -> None:
    """Train on all folds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--epochs", type=int, default=51, help="of the teacher; the student: twice")
    parser.add_argument("--folds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = sorted(path.name for path in given.folder.iterdir())
    files = [
        (file, i) for i, n in enumerate(names) for file in sorted((given.folder / n).iterdir())
    ]
    images, labels_N = (
        [decode(file.read_bytes()) for file, _ in files],
        np.array([i for _, i in files]),
    )
    order = np.random.default_rng(0).permutation(len(files))
    order = order[
        np.argsort(labels_N[order], kind="stable")
    ]  # each fold has an equal share of each class
    print("| views | teacher | student | best probe | student - probe | student - first |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = None
    for kind in given.kinds or KINDS:
        folds = [
            answers(images, labels_N, np.sort(order[k :: given.folds]), kind, given.epochs)
            for k in range(given.folds)
        ]
        right = {
            name: np.concatenate([fold[name] for fold in folds]).astype(float) for name in folds[0]
        }
        first = right["student"] if first is None else first
        means = [f"{100 * right[name].mean():.1f} %" for name in ("teacher", "student", "probe")]
        gains = [right["student"] - right["probe"], right["student"] - first]
        means += [f"{100 * g.mean():+.1f} ± {100 * g.std() / len(g) ** 0.5:.1f}" for g in gains]
        print(f"| {' | '.join([kind, *means])} |", flush=True)


if __name__ == "__main__":
    main()
