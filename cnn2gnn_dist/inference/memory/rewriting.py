"""A memory that is written anew: of an edited one it takes the list of forgotten images, and no other edit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.log import counted

NAMED = 5
"""Most classes named in a line."""


def classes_by_key(memory: Memory) -> dict[str, str]:
    """The class of each image; empty for one without a label."""
    ids = memory.live_ids
    names = [*memory.classes, ""]  # label -1: none
    labels = memory.labels[ids].tolist()
    return {key: names[label] for key, label in zip(memory.keys(ids), labels, strict=True)}


def is_edited(root: Path) -> bool:
    """Whether a memory is not the one that was written first; False if that was never completed."""
    try:
        return store.head(root) > 0
    except UserError:
        return False


def edits_of(root: Path, new: Mapping[str, str]) -> str:
    """What an edited memory has that one written anew has not, and the reverse; empty if nothing, or never edited.

    Args:
        root: of the memory that was edited.
        new: the class of each image of the new one, without forgotten ones.
    """
    if not is_edited(root):
        return ""
    try:
        old = classes_by_key(Memory.open(root))
    except (UserError, OSError) as error:
        return f"edits that can't be read ({error})"
    only_old = Counter(name for key, name in old.items() if key not in new)
    only_new = sum(key not in old for key in new)
    moved = sum(new.get(key, name) != name for key, name in old.items())
    said = []
    if only_old:
        some = [f"{name} {count}" for name, count in only_old.most_common(NAMED)]
        more = ", …" if len(only_old) > NAMED else ""
        said.append(f"{counted(only_old.total(), 'image')} more ({', '.join(some)}{more})")
    if only_new:
        said.append(f"{counted(only_new, 'image')} fewer")
    if moved:
        said.append(f"{counted(moved, 'image')} in another class")
    return ", ".join(said)
