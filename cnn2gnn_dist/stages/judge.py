"""How good are predictions: accuracy, class-balanced accuracy, confusion, calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.data.order import sequential
from cnn2gnn_dist.data.reader import Batch, Request
from cnn2gnn_dist.data.views import CLEAN
from cnn2gnn_dist.stages.context import Context, load_manifest
from cnn2gnn_dist.training import distributed

ECE_BINS = 15


@dataclass
class Predictions:
    """Predictions of N images, on every rank, in the order of the manifest.

    ``predicted_N``, ``label_N`` int64; ``confidence_N`` float32, the predicted class's
    probability. Corrupt images are left out; ``id_N`` says which are there.
    """

    id_N: np.ndarray
    predicted_N: np.ndarray
    confidence_N: np.ndarray
    label_N: np.ndarray

    def confusion(self, num_classes: int) -> np.ndarray:
        """Counts [C, C]: row = true class, column = predicted."""
        flat = self.label_N * num_classes + self.predicted_N
        return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)

    def scores(self, num_classes: int) -> dict[str, float]:
        """accuracy, balanced_accuracy (mean recall of the classes present), ece."""
        matrix = self.confusion(num_classes)
        present = matrix.sum(1) > 0
        recall = matrix.diagonal()[present] / matrix.sum(1)[present]
        right = self.predicted_N == self.label_N
        return {
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(recall.mean()),
            "ece": calibration_error(self.confidence_N, right),
        }


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error: |accuracy - confidence| over equal-width bins, weighted.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    count = np.bincount(bin_N, minlength=bins)
    gap = np.bincount(bin_N, right_N.astype(float), bins) - np.bincount(bin_N, confidence_N, bins)
    return float(np.abs(gap).sum() / max(count.sum(), 1))


def clean_batches(
    context: Context, manifest: Path, batch: int, shuffle_seed: int | None
) -> Iterator[tuple[Batch, np.ndarray]]:
    """This rank's share of all samples, clean view: batches and masks of what counts.

    Every rank gets the same number of batches (padding is masked), so that a forward
    pass may be collective.
    """
    ranks, samples = context.ranks, len(load_manifest(manifest))
    plan = list(sequential(samples, batch, ranks.rank, ranks.world_size))
    if shuffle_seed is not None:
        places = np.random.default_rng(shuffle_seed).permutation(samples)
        plan = [(places[ids], mask) for ids, mask in plan]
    with context.stream(manifest, "judge") as stream:
        read = stream.batches(Request(ids, CLEAN) for ids, _ in plan)
        for (_, mask), got in zip(plan, read, strict=True):
            yield got, mask


@torch.no_grad()
def predict_all(
    context: Context,
    classify: Callable[[Tensor, Batch], Tensor],
    manifest: Path,
    batch: int,
    shuffle_seed: int | None = None,
) -> Predictions:
    """Classify every image of a manifest (collective); ``classify`` gives logits_BC.

    A model whose images see each other (``graph.scope=batch``) is judged in shuffled
    order: stored order is often by class, and batches of one class tell the answer.
    """
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for got, mask in clean_batches(context, manifest, batch, shuffle_seed):
        images, _, _ = context.to_device(got)
        probability_BC = classify(images, got).float().softmax(1)
        confidence, predicted = probability_BC.max(1)
        keep = mask & got.valid
        for column, values in zip(
            columns,
            (got.ids, predicted.cpu().numpy(), confidence.cpu().numpy(), got.labels),
            strict=True,
        ):
            column.append(values[keep])
    mine = [np.concatenate(column) for column in columns]
    everyone = distributed.all_gather_object(mine)
    all_ids, classes, sure, truth = (np.concatenate(c) for c in zip(*everyone, strict=True))
    order = np.argsort(all_ids, kind="stable")
    return Predictions(all_ids[order], classes[order], sure[order], truth[order])


def accuracy_of(context: Context, classify: Callable[[Tensor], Tensor]) -> float:
    """Accuracy on the held-out images (collective)."""
    batch = context.config.evaluate.batch
    found = predict_all(
        context, lambda images, _: classify(images), context.paths.test_manifest, batch
    )
    return float((found.predicted_N == found.label_N).mean())
