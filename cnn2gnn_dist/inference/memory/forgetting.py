"""The list of forgotten images, ``forgotten.csv``, as it is written, and what it names; ``view.forgotten`` reads it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.index.relabel import DROP_IF_THERE, keys_named
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.memory.set_apart import SetApart
from cnn2gnn_dist.inference.memory.view import forgotten


def record_forgotten(root: Path, keys: Sequence[str]) -> None:
    """Add keys to those that later trainings leave out."""
    everything = dict.fromkeys([*forgotten(root), *keys])
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["key", "class"])
    out.writerows([key, DROP_IF_THERE] for key in everything)
    durable.write_text(root / store.FORGOTTEN, text.getvalue())


def keys_there(root: Path, apart: SetApart, names: Iterable[str]) -> set[str]:
    """The keys that a model has for images that a list of another model names, perhaps in another way (SHARD/KEY).

    Args:
        root: of its memory, whose earlier versions count as well; it need not exist.
        apart: the images that the model was calibrated on.
        names: of the images.
    """
    set_apart = apart.keys()
    return keys_named(store.images_on_disk(root) | {(key, "") for key in set_apart}, names)
