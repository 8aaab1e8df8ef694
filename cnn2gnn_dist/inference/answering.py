"""From the network's outputs to answers: the classes, the neighbors that they are based on, the path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.answers import Answer, Neighbour
from cnn2gnn_dist.inference.folder.artefact import ModelConfig
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.inference.network import Outputs
from cnn2gnn_dist.log import counted

MOST_TOGETHER = 4096
"""Images of a set: several arrays have a number for each pair of them, here 134 MB each."""


def answers_of(
    images: Sequence[str],
    made: Outputs,
    probability_BC: np.ndarray,
    spec: ModelConfig,
    memory: Memory | None,
    scores: Sequence[dict[str, Any]],
    *,
    top: int,
    neighbours: int,
) -> list[Answer]:
    """Answers of B images.

    Args:
        images: their B names.
        made: the network's outputs for them.
        probability_BC: of the classes of the memory, or of the trained ones without a memory.
        spec: of the model.
        memory: the version that the outputs were made with.
        scores: of each image, passed on unchanged.
        top: number of classes in an answer.
        neighbours: number of neighbors in an answer.
    """
    names = memory.classes if memory else spec.label_names
    trained = len(spec.label_names)
    order_BC = np.argsort(-probability_BC, axis=1, kind="stable")
    if memory is not None and len(names) > trained:  # a new class without images can't be an answer
        gone = np.flatnonzero(memory.counts() == 0)
        keep_BC = ~np.isin(order_BC, gone[gone >= trained])
        order_BC = order_BC[keep_BC].reshape(len(order_BC), -1)
    order_BC = order_BC[:, :top]
    graph = bool(made.rows.size) or spec.scope == "batch"
    return [
        Answer(
            name=image,
            label=names[order[0]],
            probability=float(probability[order[0]]),
            classes=tuple((names[c], float(probability[c])) for c in order),
            neighbours=_neighbours(memory, rows, weights, neighbours) if memory else (),
            path="new class" if order[0] >= trained else "graph" if graph else "network",
            scores=said,
        )
        for image, probability, order, rows, weights, said in zip(
            images, probability_BC, order_BC, made.rows, made.weights, scores, strict=True
        )
    ]


def _neighbours(
    memory: Memory, rows_F: np.ndarray, weights_F: np.ndarray, count: int
) -> tuple[Neighbour, ...]:
    slots = np.argsort(-weights_F, kind="stable")[:count]
    slots = slots[(rows_F[slots] >= 0) & (weights_F[slots] > 0)]
    keys = memory.keys(rows_F[slots]) if len(slots) else []
    return tuple(
        Neighbour(
            key,
            memory.classes[memory.labels[rows_F[slot]]],
            float(weights_F[slot]),
            int(rows_F[slot]),
            memory.thumbnail,
        )
        for key, slot in zip(keys, slots, strict=True)
    )


def described(kind: str, folder: Path, classes: Sequence[str], memory: Memory | None) -> str:
    """One line about a model, as Python shows it."""
    facts = [counted(len(classes), "class", "classes")]
    if memory is not None:
        facts.append(
            f"{counted(len(memory), 'image')} in version {memory.version.number} of the memory"
        )
    return f"<{kind} {str(folder)!r}: {', '.join(facts)}>"


def check_counts(**given: tuple[int, int]) -> None:
    """Check requested numbers against their minimum.

    Raises:
        UserError: one is smaller, or not a whole number.
    """
    for name, (number, least) in given.items():
        if not isinstance(number, (int, np.integer)) or number < least:
            raise UserError(f"{name}={number!r}", remedy=f"a whole number, {least} or more")


def check_together(images: int) -> None:
    """Check the size of a set whose images are compared with each other.

    Raises:
        UserError: there are more than ``MOST_TOGETHER``.
    """
    if images > MOST_TOGETHER:
        raise UserError(
            f"more than {MOST_TOGETHER:,} images to answer together",
            where="the images",
            remedy="answer one burst, object or place at a time (every pair of images is compared), or "
            "all of them without --together",
        )
