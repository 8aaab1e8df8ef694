"""How well a model answers labeled images: accuracy of its answers, of its self path, of its neighbors' vote.

Name suffixes: N images, C classes, including those added to the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import calibration_error, softmax
from cnn2gnn_dist.inference.classifier import BATCH, Classifier
from cnn2gnn_dist.inference.labelled_inputs import Labelled
from cnn2gnn_dist.inference.network import Outputs
from cnn2gnn_dist.inference.scoring import votes

ANSWERS, SELF_PATH, VOTE = "answers", "self path", "vote"
TOP = 5
SAME = 1e-6
"""Squared distance below which an image and its nearest neighbor are taken for the same image."""


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        classes: names of the C classes.
        rows: ``answers`` (what ``predict`` says) and, where there is a memory, ``self path`` (without the
            neighbors) and ``vote`` (of the neighbors alone); each has ``accuracy``, its ``standard_error``,
            ``balanced_accuracy`` (mean recall of the classes that occur), ``ece`` and ``top5``.
        confusion_CC: int64, images by true class (row) and class in the answer (column).
        unreadable: (name, reason) of images without an answer, which no figure counts.
        in_memory: images that are likely in the memory: their nearest neighbor is at distance 0.
    """

    classes: list[str]
    rows: dict[str, dict[str, float]]
    confusion_CC: np.ndarray
    unreadable: list[tuple[str, str]]
    in_memory: int

    @property
    def images(self) -> int:
        """Number of images that were answered."""
        return int(self.confusion_CC.sum())

    def recall(self) -> dict[str, float | None]:
        """Share of each class's images that are answered with it; None: the class doesn't occur."""
        total_C = self.confusion_CC.sum(1)
        right_C = self.confusion_CC.diagonal()
        return {
            name: float(right / total) if total else None
            for name, right, total in zip(self.classes, right_C, total_C, strict=True)
        }

    def confused(self, count: int) -> list[tuple[str, str, int]]:
        """The most frequent errors: (true class, answer, images), at most ``count``."""
        wrong_CC = self.confusion_CC * ~np.eye(len(self.classes), dtype=bool)
        most = np.argsort(-wrong_CC, axis=None, kind="stable")[:count]
        pairs = [divmod(int(place), len(self.classes)) for place in most]
        return [
            (self.classes[true], self.classes[said], int(wrong_CC[true, said]))
            for true, said in pairs
            if wrong_CC[true, said]
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as JSON has it."""
        return {
            "images": self.images,
            "unreadable": [{"image": name, "error": why} for name, why in self.unreadable],
            "in_memory": self.in_memory,
            "rows": self.rows,
            "classes": self.classes,
            "recall": self.recall(),
            "confusion": self.confusion_CC.tolist(),
        }


def evaluate(
    model: Classifier, images: Iterable[Labelled], step: Callable[[int], None] = lambda _: None
) -> Evaluation:
    """Answer labeled images with one version of the memory, and compare.

    Args:
        model: an opened model.
        images: as ``labelled`` gives them.
        step: called with the number of images of every batch, once it is answered.

    Raises:
        UserError: no image can be read.
    """
    memory, classes = model.memory, model.classes_
    size, given = BATCH, iter(images)
    if model.spec.scope == "batch":  # the batches of ``predict``: all about equally large
        everything = list(given)
        size = -(-len(everything) // max(1, -(-len(everything) // size)))
        given = iter(everything)
    found: dict[str, list[np.ndarray]] = {ANSWERS: []}
    labels: list[int] = []
    unreadable: list[tuple[str, str]] = []
    in_memory = 0
    while many := list(islice(given, size)):
        (decoded,) = model.batches([one.image for one in many], len(many))
        good = [place for place, one in enumerate(decoded) if one.pixels is not None]
        unreadable += [(one.name, one.error or "") for one in decoded if one.pixels is None]
        if good:
            made = model.outputs([decoded[place] for place in good], memory)
            labels += [many[place].label for place in good]
            found[ANSWERS].append(model.probabilities(made, memory))
            if memory is not None:
                _without_head(made, memory, found)
                in_memory += int((made.distances[:, :1] < SAME).sum())
        step(len(many))
    if not labels:
        raise UserError(
            f"none of the {len(unreadable):,} images can be read"
            + (f"; the first: {unreadable[0][1]}" if unreadable else ""),
            remedy="name a folder, shards or Parquet files that contain images",
        )
    label_N = np.array(labels)
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    rows = {name: _figures(p_NC, label_N) for name, p_NC in joined.items()}
    confusion_CC = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion_CC, (label_N, joined[ANSWERS].argmax(1)), 1)
    return Evaluation(classes, rows, confusion_CC, unreadable, in_memory)


def _without_head(made: Outputs, memory: Any, found: dict[str, list[np.ndarray]]) -> None:
    found.setdefault(SELF_PATH, []).append(softmax(made.self_logits).astype(np.float32))
    found.setdefault(VOTE, []).append(votes(made, memory, len(memory.classes)))


def _figures(p_NC: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """Figures of probabilities [N, C or fewer]: an image of a class without a column is wrong."""
    right_N = p_NC.argmax(1) == label_N
    count = len(label_N)
    accuracy = float(right_N.mean())
    present = np.unique(label_N)
    recalls = [right_N[label_N == label].mean() for label in present]
    known = label_N < p_NC.shape[1]
    own_N = np.where(known, p_NC[np.arange(count), np.where(known, label_N, 0)], -1.0)
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        "balanced_accuracy": float(np.mean(recalls)),
        "ece": calibration_error(p_NC, label_N),
        "top5": float((known & ((p_NC > own_N[:, None]).sum(1) < TOP)).mean()),
    }
