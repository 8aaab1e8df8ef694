"""What edits have changed about the training images in a memory, for the next training (``audit --fix``)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

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
    """Compare a memory with its earliest version on disk.

    Raises:
        UserError: it is missing or damaged.
    """
    now, since = Memory.open(root), store.numbers(root)[0]
    first = Memory.open(root, since)
    ids = np.flatnonzero(first.live & ~first.added)
    live, label = now.live[ids], now.labels[ids]
    other = live & (label != first.labels[ids])
    new = other & (label >= now.trained)
    known = ids[(other & ~new) | ~live]
    names = [now.classes[now.labels[row]] if now.live[row] else None for row in known.tolist()]
    return Changes(dict(zip(now.keys(known), names, strict=True)), int(new.sum()), since)
