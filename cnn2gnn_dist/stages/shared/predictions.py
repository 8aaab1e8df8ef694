"""Quality of predictions: accuracy, class-balanced accuracy, confusion, calibration."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.images.views import CLEAN
from cnn2gnn_dist.data.reading.reader import Batch, Request
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import calibration_error
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages.shared.context import Context, CorruptCount, load_manifest

_UNEVEN = 1.5
"""Share of the most frequent class over that of equal classes from which the classes count as uneven."""
_ABOUT = 0.05
"""Distance up to which an accuracy is about that share."""
HELD_OUT_NOTE = "held-out.json"
Answer = Callable[[Tensor], dict[str, Tensor]]
"""uint8 images [B, H, W, 3] → probabilities [B, C] under one or more names."""


@dataclass
class Predictions:
    """Predictions of N images, on every rank, in the order of the manifest.

    ``predicted_N``, ``label_N`` int64; ``confidence_N`` float32, the predicted class's
    probability. Corrupt images are excluded; ``id_N`` lists those included.
    """

    id_N: np.ndarray
    predicted_N: np.ndarray
    confidence_N: np.ndarray
    label_N: np.ndarray

    def scores(self, num_classes: int) -> dict[str, float]:
        """accuracy, balanced_accuracy (mean recall of the classes present), ece."""
        right = self.predicted_N == self.label_N
        # Not from a confusion matrix: with 20,000 classes it takes gigabytes.
        images_C = np.bincount(self.label_N, minlength=num_classes)
        right_C = np.bincount(self.label_N[right], minlength=num_classes)
        present = images_C > 0
        return {
            "accuracy": float(right.mean()),
            "balanced_accuracy": float((right_C[present] / images_C[present]).mean()),
            "ece": calibration_error(self.confidence_N, right),
        }

    def failure(self) -> str | None:
        """Why this can't be the work of a model that has learned anything; None if it may be.

        A training that diverges answers one class for all images, and goes on to its end without an error.
        Where most images are of one class, a model may have fewer answers right than that one, and know the others:
        its mean recall is then above that of guesses, by more than three standard errors of these.
        """
        images_C = np.bincount(self.label_N)
        most = float(images_C.max() / images_C.sum())
        right_N = self.predicted_N == self.label_N
        accuracy = float(right_N.mean())
        if (images_C > 0).sum() < 2 or accuracy > most:
            return None
        recall_C = np.bincount(self.label_N[right_N], minlength=len(images_C))[images_C > 0]
        images_C = images_C[images_C > 0]
        guess = 1 / len(images_C)
        spread = math.sqrt(guess * (1 - guess) * (1 / images_C).sum()) / len(images_C)
        if (recall_C / images_C).mean() > guess + 3 * spread:
            return None
        said = len(np.unique(self.predicted_N))
        return (
            f"{accuracy:.1%} of the held-out images are right, no more than by always answering the most frequent "
            f"class ({most:.1%})" + ("; it answers one class for all of them" if said == 1 else "")
        )

    def cause(self) -> str:
        """What probably explains a ``failure``, as a sentence: classes of very different sizes come first."""
        images_C = np.bincount(self.label_N)
        images_C = images_C[images_C > 0]
        count, most = int(images_C.sum()), int(images_C.max())
        about_most = (self.predicted_N == self.label_N).mean() > most / count - _ABOUT
        if most * len(images_C) < _UNEVEN * count or not about_most:
            return "Its training has diverged, or was far too short"
        return (
            f"The classes are uneven, with {count - most:,} of {count:,} held-out images not of the most frequent one: "
            "the others may have too few images to learn from. Else its training has diverged, or was far too short"
        )


@dataclass
class Evaluation:
    """Predictions for every name of an ``Answer``; which images were excluded, and why."""

    found: dict[str, Predictions]
    left_out: dict[int, str]


def batches_of(samples: int, batch: int, shuffle_seed: int | None = None) -> list[np.ndarray]:
    """Sample ids in batches of nearly equal size, at most ``batch``; the same for any ranks.

    A last batch of a few images would bias models in which the images of a batch influence each other.
    """
    places = np.arange(samples)
    if shuffle_seed is not None:
        places = np.random.default_rng(shuffle_seed).permutation(samples)
    return np.array_split(places, -(-samples // batch)) if samples else []


def readable_rows(batch: Batch) -> Batch:
    """The rows of a batch whose images could be read."""
    keep = batch.valid
    return Batch(batch.images[keep], batch.labels[keep], batch.ids[keep], keep[keep])


def own_batches(
    context: Context, manifest: Path, shuffle_seed: int | None, corrupt: CorruptCount
) -> Iterator[Batch | None]:
    """This rank's batches of all samples, clean view, without corrupt ones, which are recorded.

    Batches go to the ranks round-robin. Every rank gets the same number, with None for a missing or
    completely corrupt batch, so that a forward pass may be collective.
    """
    ranks = context.ranks
    plan = batches_of(corrupt.total, context.config.evaluate.batch, shuffle_seed)
    mine = plan[ranks.rank :: ranks.world_size]
    with context.stream(manifest, "evaluate") as stream:
        for batch in stream.batches(Request(ids, CLEAN) for ids in mine):
            corrupt.note(batch)
            yield readable_rows(batch) if batch.valid.any() else None
    for _ in range(-(-len(plan) // ranks.world_size) - len(mine)):
        yield None


@torch.no_grad()
def evaluate(
    context: Context, answer: Answer, manifest: Path, shuffle_seed: int | None = None
) -> Evaluation:
    """Run a model on every readable image of a manifest (collective).

    A model in which the images of a batch influence each other (``graph.scope=batch``) is evaluated in
    shuffled order: stored order is often by class, and batches of one class give the answer away.

    Raises:
        UserError: on every rank: too many corrupt images (``data.max_corrupt``), or no others;
            an answer that is not finite.
    """
    corrupt = held_out_count(context, manifest)
    columns: dict[str, list[list[np.ndarray]]] = {}
    for batch in own_batches(context, manifest, shuffle_seed, corrupt):
        if batch is None:  # stay in step with the other ranks
            answer(_dummy_images(context))
            continue
        images, _, _ = context.to_device(batch)
        for name, probability_BC in answer(images).items():
            sure, predicted = probability_BC.float().max(1)
            row = [batch.ids, predicted.cpu().numpy(), sure.cpu().numpy(), batch.labels]
            columns.setdefault(name, []).append(row)
    left_out = corrupt.check()
    check_any_left(corrupt.total, left_out)
    everyone = collectives.all_gather_object(columns)
    names = dict.fromkeys(name for one in everyone for name in one)
    found = {
        name: _joined([row for one in everyone for row in one.get(name, [])]) for name in names
    }
    for name, one in found.items():
        _check_finite(name, one)
    return Evaluation(found, left_out)


def accuracy_of(context: Context, classify: Callable[[Tensor], Tensor]) -> float:
    """Accuracy on the held-out images (collective); ``classify`` returns logits."""

    def answer(images: Tensor) -> dict[str, Tensor]:
        return {"model": classify(images).float().softmax(1)}

    found = evaluate(context, answer, context.paths.test_manifest).found["model"]
    return float((found.predicted_N == found.label_N).mean())


def check_held_out(context: Context) -> None:
    """Check that the held-out images can be read, before anything is trained (collective).

    Done once per manifest: the record is in the stage's folder.

    Raises:
        UserError: as ``evaluate``.
    """
    manifest = context.paths.test_manifest
    note, digest = context.folder / HELD_OUT_NOTE, load_manifest(manifest).digest
    known = note.is_file() and note.read_text(encoding="utf-8") == json.dumps(digest)
    if collectives.broadcast_object(known):
        return
    corrupt = held_out_count(context, manifest)
    for _ in own_batches(context, manifest, None, corrupt):
        pass
    left_out = corrupt.check()
    check_any_left(corrupt.total, left_out)
    if left_out:
        context.warn(describe_left_out(left_out, corrupt.total))
    if context.ranks.is_first:
        durable.write_text(note, json.dumps(digest))


def describe_left_out(left_out: dict[int, str], total: int) -> str:
    """Describe in one line the held-out images that are not evaluated."""
    some = "; ".join(left_out[sample] for sample in sorted(left_out)[:3])
    return f"{len(left_out)} of {total} held-out images are corrupt and not evaluated: {some}"


def held_out_count(context: Context, manifest: Path) -> CorruptCount:
    """A count of corrupt images under the run's limit."""
    total = len(load_manifest(manifest))
    return CorruptCount(context.config.data.max_corrupt, total, what="held-out images")


def check_any_left(total: int, left_out: dict[int, str]) -> None:
    """Check that there are images to evaluate.

    Raises:
        UserError: there are none.
    """
    if len(left_out) < total:
        return
    some = "; ".join(left_out[sample] for sample in sorted(left_out)[:3])
    raise UserError(
        f"none of the {total} held-out images can be read: {some}"
        if total
        else "there are no held-out images",
        where="data.test",
        remedy="fix them, or give other held-out images",
    )


def _dummy_images(context: Context) -> Tensor:
    size = context.config.views.size
    return torch.zeros(1, size, size, 3, dtype=torch.uint8, device=context.device)


def _joined(rows: list[list[np.ndarray]]) -> Predictions:
    ids, classes, sure, truth = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(ids, kind="stable")
    return Predictions(ids[order], classes[order], sure[order], truth[order])


def _check_finite(name: str, found: Predictions) -> None:
    wrong = int((~np.isfinite(found.confidence_N)).sum())
    if wrong:
        raise UserError(
            f"{wrong} of {len(found.id_N)} predictions of the {name} are not finite",
            where="evaluate",
            remedy="check its loss in metrics.jsonl; retrain it with a smaller lr",
        )
