"""Contents of a folder given as the data: its files of one kind, or what it contains instead."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from cnn2gnn_dist.data.images.formats import IMAGE_SUFFIXES
from cnn2gnn_dist.errors import UserError

_MAX_EXAMINED = 2000
"""Maximum entries of a folder tree to examine for a message."""
_SPLIT = re.compile(
    r"(?:^|[-_. ])(train|training|trainval|val|valid|validation|dev|test|testing|eval|heldout|holdout)"
    r"(?=[-_. ]|\d|$)",
    re.IGNORECASE,
)
_PARTS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
}
KINDS = {".tar": "shards", ".parquet": "parquet"}
"""File suffix → the value of ``data.source`` that reads such files."""


def part_of(name: str) -> str | None:
    """Return the split that a name refers to: "train", "val", "test" or None."""
    match = _SPLIT.search(name)
    return _PARTS.get(match.group(1).lower(), "val") if match else None


def contains_val(name: str) -> bool:
    """Return whether a name says that the validation images are among the training ones: ``trainval``."""
    match = _SPLIT.search(name)
    return bool(match) and match.group(1).lower() == "trainval"  # type: ignore[union-attr]


def is_part(name: str) -> bool:
    """Return whether a name is a split name and nothing else: ``train``, ``Val``, ``test2017``."""
    match = _SPLIT.match(name)
    return bool(match) and not name[match.end() :].strip("0123456789-_. ")  # type: ignore[union-attr]


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names in a folder, sorted.

    Raises:
        UserError: it can't be read.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"the folder can't be read: {error.strerror}",
            where=os.fspath(folder),
            remedy="make it readable for this user, or name another one",
        ) from None


def folders_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the folders in a folder that are not hidden, sorted; errors as ``names_in``."""
    return [
        name
        for name in names_in(folder)
        if name[0] != "." and os.path.isdir(os.path.join(folder, name))
    ]


def files_in(folder: str, suffix: str) -> list[str]:
    """Return the files of a suffix in a folder, sorted; for Parquet also in its ``data`` folder.

    Hidden files (``._x.parquet`` of macOS) are left out.

    Raises:
        UserError: there are none (the message says what is there instead), or they are mixed (``refuse_mixed``).
    """
    for place in (folder, os.path.join(folder, "data")) if suffix == ".parquet" else (folder,):
        found = [
            os.path.join(place, name)
            for name in (names_in(place) if os.path.isdir(place) else [])
            if name.lower().endswith(suffix) and not name.startswith(".")
        ]
        if found:
            refuse_mixed(place, found, suffix)
            return found
    raise UserError(
        f"the folder contains no {suffix} files{_instead(folder, suffix)}",
        where=folder,
        remedy=_remedy(folder, suffix),
    )


def refuse_mixed(folder: str, files: Sequence[str], suffix: str) -> None:
    """Refuse the files of a folder, local or remote, that belong to several splits of a data set.

    Files that are not named after a split may go with training ones, but not with held-out ones, which would be
    trained on.

    Raises:
        UserError: they do.
    """
    parts: dict[str | None, str] = {}
    for file in files:
        name = os.path.basename(file)
        parts.setdefault(part_of(name), name)
    if len(parts) < 2 or parts.keys() == {None, "train"}:
        return
    some = ", ".join(f"'{name}'" for name in parts.values())
    everything = f"'{os.path.join(folder, '*' + suffix)}' selects all of them"
    raise UserError(
        f"the folder contains files of several splits of a data set: {some}",
        where=folder,
        remedy=f"move the held-out ones to a folder of their own; {everything}"
        if None in parts and "train" not in parts
        else "select one split with a glob, such as data.train='"
        f"{os.path.join(folder, _glob(parts, suffix))}'; {everything}",
    )


def _glob(parts: dict[str | None, str], suffix: str) -> str:
    """Return a glob of the training files if there are any, else of the first split."""
    name = parts.get("train") or next(name for part, name in parts.items() if part is not None)
    match = _SPLIT.search(name)
    assert match is not None
    return f"{name[: match.end()]}*{suffix}"


def files_by_source(folder: str) -> dict[str, int]:
    """Count the files of each ``data.source`` kind in a folder and below it."""
    counts: dict[str, int] = {}
    for name, below in islice(_walk(folder), _MAX_EXAMINED):
        if not name:
            continue
        suffix = os.path.splitext(name)[1].lower()
        source = KINDS.get(suffix)
        # imagefolder checks files without a suffix by their bytes.
        if below and (suffix[1:] in IMAGE_SUFFIXES or not suffix):
            source = "imagefolder"
        if source is not None:
            counts[source] = counts.get(source, 0) + 1
    return counts


def _walk(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield the names of a tree's files that are not hidden, and whether each is in a subfolder.

    Each folder first yields an empty name, so that cyclic links count toward the limit and end.
    """
    for place, folders, files in os.walk(folder, followlinks=True):
        yield "", False
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield name, place != folder


def other_source(folder: str, source: str) -> str | None:
    """Return the source that fits a folder's files if they are not of ``source``."""
    found = files_by_source(folder)
    if not found or found.get(source):
        return None
    return max(found, key=lambda name: found[name])


def _instead(folder: str, suffix: str) -> str:
    words = {"shards": ".tar", "parquet": "Parquet", "imagefolder": "image"}
    found = {words[source]: count for source, count in files_by_source(folder).items()}
    found.pop(words[KINDS[suffix]], None)
    if found:
        return ", only " + " and ".join(f"{kind} files" for kind in found)
    return "" if any(True for _ in os.scandir(folder)) else ": it is empty"


def _remedy(folder: str, suffix: str) -> str:
    source = KINDS[suffix]
    other = other_source(folder, source)
    if other is not None:
        return f"set data.source={other} if this is the data, or name another folder"
    deeper = next(
        (
            place
            for place, _, files in islice(os.walk(folder), _MAX_EXAMINED)
            if any(name.lower().endswith(suffix) and not name.startswith(".") for name in files)
        ),
        None,
    )
    if deeper is not None:
        return f"name the folder that contains the files: {deeper}"
    if suffix == ".tar":
        return "point to the folder of the shards, or pack the images first"
    return "point to the folder of the Parquet files"


def refuse_parts_as_classes(root: str, names: Sequence[str]) -> None:
    """Refuse an image tree whose folders are the splits of a data set (train, test), not its classes.

    Args:
        root: the tree.
        names: its folders.

    Raises:
        UserError: they are splits.
    """
    parts = {name: part_of(name) for name in names if is_part(name)}
    kinds = set(parts.values())
    if not parts or (len(parts) < len(names) and not (len(kinds) > 1 and "train" in kinds)):
        return
    train = next((name for name, part in parts.items() if part == "train"), None)
    held_out = next((name for name, part in parts.items() if part != "train"), None)
    remedy = f"data.train={os.path.join(root, train or names[0])}"
    if train is not None and held_out is not None:
        remedy += f" data.test={os.path.join(root, held_out)}"
    listed = ", ".join(f"'{name}'" for name in parts)
    raise UserError(
        f"the folder contains splits of a data set ({listed}), which would be mistaken for classes",
        where=root,
        remedy=remedy,
    )
