"""How well a model answers labeled images: accuracy of its answers, of its self path, of its neighbors' vote.

Name suffixes: N images, C classes, including those added to the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import calibration_error, softmax
from cnn2gnn_dist.inference.classifier import BATCH, Classifier
from cnn2gnn_dist.inference.inputs import even_size
from cnn2gnn_dist.inference.labelled_inputs import Labelled
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.inference.network import Outputs
from cnn2gnn_dist.inference.scoring import votes

ANSWERS, SELF_PATH, VOTE = "answers", "self path", "vote"
TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        classes: names of the C classes.
        rows: ``answers`` (what ``predict`` says) and, where there is a memory, ``self path`` (without the
            neighbors) and ``vote`` (of the neighbors alone); each has ``accuracy``, its ``standard_error``,
            ``balanced_accuracy`` (mean recall of the classes that occur), ``ece`` (only the answers are calibrated, so
            theirs doesn't compare with the others') and ``top5``.
        confusion_CC: int64, images by true class (row) and class in the answer (column).
        unreadable: (name, reason) of images without an answer, which no figure counts.
        in_memory: images that are in the memory (``Memory.same``).
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


def evaluate(model: Classifier, images: Iterable[Labelled]) -> Evaluation:
    """Answer labeled images with one version of the memory, and compare.

    Args:
        model: an opened model.
        images: as ``labelled`` gives them.

    Raises:
        UserError: no image can be read.
    """
    memory, classes = model.memory, model.classes_
    size, given = BATCH, iter(images)
    if model.spec.scope == "batch":  # the batches of ``predict``: all about equally large
        everything = list(given)
        size = even_size(len(everything), size)
        given = iter(everything)
    found: dict[str, _Row] = {}
    unreadable: list[tuple[str, str]] = []
    in_memory = 0
    while many := list(islice(given, size)):
        (decoded,) = model.batches([one.image for one in many], len(many))
        good = [place for place, one in enumerate(decoded) if one.pixels is not None]
        unreadable += [(one.name, one.error or "") for one in decoded if one.pixels is None]
        if good:
            made = model.outputs([decoded[place] for place in good], memory)
            label_B = np.array([many[place].label for place in good])
            for name, p_BC in _answers(model, made, memory).items():
                found.setdefault(name, _Row()).add(p_BC, label_B)
            if memory is not None:
                in_memory += int((memory.same(made.x, made.rows) >= 0).sum())
    if not found:
        raise UserError(
            f"none of the {len(unreadable):,} images can be read"
            + (f"; the first: {unreadable[0][1]}" if unreadable else ""),
            remedy="name a folder, shards or Parquet files that contain images",
        )
    answers = found[ANSWERS]
    confusion_CC = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion_CC, (answers.column("label"), answers.column("predicted")), 1)
    rows = {name: row.figures() for name, row in found.items()}
    return Evaluation(classes, rows, confusion_CC, unreadable, in_memory)


def _answers(model: Classifier, made: Outputs, memory: Memory | None) -> dict[str, np.ndarray]:
    """Probabilities [B, C] of each row; the self path knows the trained classes only."""
    found = {ANSWERS: model.probabilities(made, memory)}
    if memory is not None:
        found[SELF_PATH] = softmax(made.self_logits).astype(np.float32)
        found[VOTE] = votes(made, memory, len(memory.classes))
    return found


class _Row:
    """What is kept of the answers of one kind: a few numbers per image, not its probabilities."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, p_BC: np.ndarray, label_B: np.ndarray) -> None:
        """Keep what the figures need of a batch."""
        known_B = label_B < p_BC.shape[1]  # an image of a class without a column is wrong
        own_B = np.where(known_B, p_BC[np.arange(len(label_B)), np.where(known_B, label_B, 0)], 0)
        kept = {
            "label": label_B,
            "predicted": p_BC.argmax(1),
            "confidence": p_BC.max(1),
            "top": (own_B > 0) & ((p_BC > own_B[:, None]).sum(1) < TOP),
        }
        for name, column_B in kept.items():
            self._parts.setdefault(name, []).append(column_B)

    def column(self, name: str) -> np.ndarray:
        """One of the numbers kept, of all images."""
        return np.concatenate(self._parts[name])

    def figures(self) -> dict[str, float]:
        """See ``Evaluation.rows``."""
        label_N = self.column("label")
        right_N = self.column("predicted") == label_N
        accuracy = float(right_N.mean())
        recalls = np.bincount(label_N, right_N) / np.maximum(np.bincount(label_N), 1)
        return {
            "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(label_N)),
            "balanced_accuracy": float(recalls[np.unique(label_N)].mean()),
            "ece": calibration_error(self.column("confidence"), right_N),
            "top5": float(self.column("top").mean()),
        }
