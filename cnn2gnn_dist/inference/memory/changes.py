"""What edits have changed about the training images in a memory, for the next training (``audit --fix``)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.memory.view import Memory


class Changes(NamedTuple):
    """The images that were there from the start, and were relabeled or removed.

    Attributes:
        classes: key → class; None: removed.
        moved: images that now have a class which training did not know.
        since: number of the version from which on edits are known; greater than 0 after a compaction.
    """

    classes: dict[str, str | None]
    moved: int
    since: int


def changes(root: Path) -> Changes:
    """Compare a memory with its earliest version on disk, or that of its last compaction.

    Raises:
        UserError: it is missing or damaged.
        OSError: a file can't be read.
    """
    now, first = _both(root)
    since = first.version.number
    ids = np.flatnonzero(first.live & ~first.added)
    live, label = now.live[ids], now.labels[ids]
    other = live & (label != first.labels[ids])
    new = other & (label >= now.trained)
    known = ids[(other & ~new) | ~live]
    names = [now.classes[now.labels[row]] if now.live[row] else None for row in known.tolist()]
    return Changes(dict(zip(now.keys(known), names, strict=True)), int(new.sum()), since)


def _both(root: Path) -> tuple[Memory, Memory]:
    """The current version of a memory and the earliest one on disk whose rows have the same numbers.

    Raises:
        UserError: it is missing or damaged.
        OSError: a file can't be read.
    """
    while True:
        now = Memory.open(root)
        try:
            for number in store.numbers(root):
                # A compaction numbers rows anew; one that was killed may have left the versions from before it.
                if store.read_version(root, number).segments[0] == now.version.segments[0]:
                    return now, Memory.open(root, number)
        except (UserError, OSError):
            if store.head(root) == now.version.number:
                raise  # otherwise a compaction has deleted it meanwhile
