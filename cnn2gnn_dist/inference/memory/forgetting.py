"""The list of forgotten images, ``forgotten.csv``, as it is written; ``view.forgotten`` reads it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from cnn2gnn_dist import durable
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.memory.view import forgotten

DROP_IF_THERE = "drop?"
"""What ``data.relabel`` reads as: leave this image out if it is among the training images."""


def record_forgotten(root: Path, keys: Sequence[str]) -> None:
    """Add keys to those that later trainings leave out."""
    everything = dict.fromkeys([*forgotten(root), *keys])
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["key", "class"])
    out.writerows([key, DROP_IF_THERE] for key in everything)
    durable.write_text(root / store.FORGOTTEN, text.getvalue())
