"""What kind of data set a path is, and which part of it is held out."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cnn2gnn_dist.data.images.file_kind import ENOUGH, kind_of, remedy_for
from cnn2gnn_dist.data.images.formats import IMAGE_SUFFIXES
from cnn2gnn_dist.data.images.image_files import find_images, printable
from cnn2gnn_dist.data.storage import folders
from cnn2gnn_dist.data.storage.shard_paths import expand
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import UserError

Kind = Literal["imagefolder", "parquet", "shards"]
Paths = str | list[str]
_SUFFIX = {"shards": ".tar", "parquet": ".parquet"}
_PACKED = {
    "a zip archive",
    "a 7z archive",
    "a gzip file",
    "a bzip2 file",
    "an xz file",
    "a zstd file",
}
_WORDS = {"imagefolder": "folders of images", "parquet": "Parquet files", "shards": "tar shards"}
_HELD_OUT = ("val", "test")
"""Parts that may be held out, the preferred one first: a test set is for when all choices are made."""


@dataclass(frozen=True)
class Source:
    """A data set as the config names it: ``data.source``, ``data.train``, ``data.test``.

    Attributes:
        kind: imagefolder, parquet or shards.
        train: a folder, a file, a glob, or a list of files; absolute.
        test: the same for the held-out images; None: they have to be split off.
        unused: names of parts that neither of them uses.
        note: why validation images are not held out; empty: they are, or there are none.
    """

    kind: Kind
    train: Paths
    test: Paths | None = None
    unused: tuple[str, ...] = ()
    note: str = ""


def find_source(place: str) -> Source:
    """Find out what is at a path: class folders, Parquet files or shards, with train and val or test parts.

    Raises:
        UserError: nothing is there, or nothing to train on; several kinds; parts, but no training
            part.
    """
    place = os.path.expanduser(place)
    if is_remote(place):
        raise UserError(
            "init reads images on disk, and this is a URL",
            where=place,
            remedy="copy a few of the shards here and name their folder; then set data.train to the URL",
        )
    place = os.path.abspath(place)
    if os.path.isdir(place):
        return _folder(place)
    if os.path.isfile(place):
        return Source(_kind_of_file(place), place)
    for kind, suffix in _SUFFIX.items():
        if place.endswith(suffix):
            expand(place, suffix)  # type: ignore[arg-type]  # raises if nothing matches
            return Source(kind, place)  # type: ignore[arg-type]
    raise UserError(
        "there is no such folder or file",
        where=place,
        remedy="name a folder with a folder of images for each class, a folder of Parquet files or tar "
        "shards, or a pattern such as 'data/train-*.parquet'",
    )


def _kind_of_file(place: str) -> Kind:
    with open(place, "rb") as file:
        kind = kind_of(file.read(ENOUGH))
    if kind == "a Parquet file":
        return "parquet"
    if kind == "a tar archive":
        return "shards"
    raise UserError(
        f"this is {kind or 'a file of another kind'}", where=place, remedy=_remedy(kind or "")
    )


def _remedy(kind: str) -> str:
    name = "name the folder that holds a folder of images for each class"
    if kind.endswith("image"):
        return name
    if kind in _PACKED:
        return f"unpack it, and {name}"
    return remedy_for(kind, name)


def _folder(place: str) -> Source:
    names = folders.folders_in(place)
    parts = _parts(place, names)
    if parts:
        kind, test = _kind_in(parts["train"]), None
        part, note = _held_out({part: [os.path.basename(path)] for part, path in parts.items()})
        held = parts.get(part)
        if held is not None:
            other = _kind_in(held)
            if other != kind:
                raise UserError(
                    f"the training part holds {_WORDS[kind]}, and the held-out part {_WORDS[other]}",
                    where=place,
                    remedy="use one kind for both",
                )
            test = held
        used = {os.path.basename(parts["train"]), os.path.basename(test or "")}
        unused = tuple(sorted(name for name in names if name not in used))
        return Source(kind, parts["train"], test, unused, note)
    kind = _kind_in(place)
    return Source(kind, place) if kind == "imagefolder" else _of_files(place, kind)


def _held_out(names: Mapping[str, list[str]]) -> tuple[str, str]:
    """Which part is held out (empty: none), and a note if it is not the validation part because of its name.

    Args:
        names: by part, of its folder or of its files.
    """
    part = next((part for part in _HELD_OUT if part in names), "")
    both = next(filter(folders.contains_val, names["train"]), None)
    if part != "val" or both is None:
        return part, ""
    part = "test" if "test" in names else ""
    instead = f"'{printable(names['test'][0])}' is" if part else "a share of the training images is"
    return part, (
        f"by its name, '{printable(both)}' contains the images of '{printable(names['val'][0])}', so {instead} "
        "held out; if it does not, set data.test"
    )


def _parts(place: str, names: Sequence[str]) -> dict[str, str]:
    """Part → folder, if the folders are parts of a data set (train, val); empty if they are classes."""
    try:
        folders.refuse_parts_as_classes(place, names)
        return {}
    except UserError:
        pass
    found: dict[str, str] = {}
    for name in names:
        part = folders.part_of(name)
        if folders.is_part(name) and part is not None:
            if part in found:
                raise UserError(
                    f"two folders are the same part of a data set: "
                    f"'{os.path.basename(found[part])}' and '{name}'",
                    where=place,
                    remedy=f"name the training images alone: cnn2gnn init {os.path.join(place, name)}",
                )
            found[part] = os.path.join(place, name)
    if "train" not in found:
        listed = ", ".join(f"'{name}'" for name in names)
        raise UserError(
            f"the folder holds parts of a data set ({listed}), and none of them is for training",
            where=place,
            remedy="name the training images' folder 'train', or name the folder to train on itself",
        )
    return found


def _kind_in(folder: str) -> Kind:
    counts = folders.files_by_source(folder)
    if len(counts) > 1 and not find_images(folder, classes=True).images:
        counts.pop("imagefolder", None)  # files without a suffix, such as LICENSE
    if len(counts) > 1:
        seen = " and ".join(_WORDS[kind] for kind in sorted(counts))
        raise UserError(
            f"the folder holds {seen}: it is unclear which of them are the data",
            where=folder,
            remedy="name one kind: a folder of its own, or a pattern such as "
            f"'{os.path.join(folder, '*' + _SUFFIX['parquet' if 'parquet' in counts else 'shards'])}'",
        )
    if counts:
        return next(iter(counts))  # type: ignore[arg-type]
    raise _no_images(folder)


def _no_images(folder: str) -> UserError:
    if not any(True for _ in os.scandir(folder)):
        return UserError(
            "the folder is empty",
            where=folder,
            remedy="put a folder of images for each class into it",
        )
    loose = [image for image in find_images(folder).images if os.sep not in image]
    if loose:
        return UserError(
            f"the folder holds {len(loose)} images but no class folders, so their classes are unknown",
            where=folder,
            remedy="move them into a folder for each class: FOLDER/CLASS/IMAGE",
        )
    found = find_images(folder)
    there = f", only {found.summary()}" if found.left_out else ""
    return UserError(
        f"the folder holds no images{there}",
        where=folder,
        remedy="the layout is FOLDER/CLASS/IMAGE, with one of: " + ", ".join(IMAGE_SUFFIXES),
    )


def _of_files(folder: str, kind: Kind) -> Source:
    """Parquet files or shards in one folder, whose names may say which part they belong to."""
    suffix = _SUFFIX[kind]
    for place in (folder, os.path.join(folder, "data")) if kind == "parquet" else (folder,):
        files = [
            os.path.join(place, name)
            for name in (folders.names_in(place) if os.path.isdir(place) else [])
            if name.lower().endswith(suffix) and not name.startswith(".")
        ]
        if files:
            break
    by_part: dict[str | None, list[str]] = {}
    for file in files:
        by_part.setdefault(folders.part_of(os.path.basename(file)), []).append(file)
    if len(by_part.keys() - {None}) < 2:
        folders.files_in(folder, suffix)  # raises if there are none directly in it
        return Source(kind, folder)
    if "train" not in by_part:
        raise UserError(
            "the folder holds files of several parts of a data set, and none is for training: "
            + ", ".join(f"'{os.path.basename(found[0])}'" for found in by_part.values()),
            where=folder,
            remedy=f"name the files to train on by a pattern: '{place}/NAME*{suffix}'",
        )
    held, note = _held_out(
        {part: list(map(os.path.basename, found)) for part, found in by_part.items() if part}
    )
    unused = [
        os.path.basename(file)
        for part, found in by_part.items()
        if part not in ("train", held)
        for file in found
    ]
    test = _short(by_part[held]) if held else None
    return Source(kind, _short(by_part["train"]), test, tuple(sorted(unused)), note)


def _short(files: list[str]) -> Paths:
    """One glob for the files if it matches exactly these, else the list."""
    folder, first = os.path.split(files[0])
    names = [os.path.basename(file) for file in files]
    name = names[0]
    while not all(other.startswith(name) for other in names):
        name = name[:-1]
    pattern = os.path.join(glob.escape(folder), f"{name}*{os.path.splitext(first)[1]}")
    if len(files) == 1:
        return files[0]
    return (
        pattern if sorted(glob.glob(pattern)) == files and folder == glob.escape(folder) else files
    )
