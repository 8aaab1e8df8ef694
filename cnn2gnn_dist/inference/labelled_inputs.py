"""Labeled images, as a user has them: folders of class folders, tar shards, Parquet files → inputs and classes.

Labels are read as ``pack`` and ``index`` read them for training. Classes that have a name are matched with the
model's by it; classes that are only numbered count in the model's order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn2gnn_dist.data.images.image_files import find_images, printable
from cnn2gnn_dist.data.index import manifest
from cnn2gnn_dist.data.index.class_matching import plain
from cnn2gnn_dist.data.packing.parquet import open_parquet, read_labels
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.inputs import Input, expand, image_column, is_shard
from cnn2gnn_dist.log import quoted

_log = logging.getLogger(__name__)
_SHOWN = 3  # classes named in a message


@dataclass(frozen=True)
class Labelled:
    """One image and its class, a position among the model's classes."""

    image: Input
    label: int


def labelled(
    paths: Sequence[str], classes: Sequence[str], label_column: str = "label"
) -> Iterator[Labelled]:
    """Every image of the inputs, in order, with its class.

    Args:
        paths: folders with a folder of images for each class, tar shards, Parquet files.
        classes: names of the model's classes.
        label_column: of Parquet files.

    Raises:
        UserError: something else is named; an image has no label, or a class that the model doesn't
            have; a folder without classes, a file that can't be read.
    """
    for path in paths:
        if os.path.isdir(path):
            yield from _of_folder(path, classes)
        elif is_shard(path):
            yield from _of_shard(path, classes)
        elif path.lower().endswith(".parquet"):
            yield from _of_parquet(path, classes, label_column)
        else:
            there = os.path.exists(path)
            raise UserError(
                "an image alone has no label" if there else "there is no such file",
                where=printable(path),
                remedy="name a folder with a folder of images for each class, tar shards or Parquet files",
            )


def _of_folder(path: str, classes: Sequence[str]) -> Iterator[Labelled]:
    found = find_images(path, classes=True)
    if found.left_out:
        _log.warning(f"{printable(path)}: left out: {found.summary()}")
    if not found.images:
        raise UserError(
            "this folder has no class folders with images",
            where=printable(path),
            remedy=_files_in(path) or "use the layout FOLDER/CLASS/IMAGE",
        )
    folder_of = [image.split(os.sep)[0] for image in found.images]
    names = sorted(set(folder_of))
    number = {name: place for place, name in enumerate(names)}
    label_N = np.array([number[name] for name in folder_of])
    positions_N = _in_model([printable(name) for name in names], label_N, classes, path)
    for image, label in zip(found.images, positions_N.tolist(), strict=True):
        full = Path(path) / image
        yield Labelled(Input(printable(full), full), label)


def _files_in(folder: str) -> str:
    """The remedy for a folder of shards or Parquet files, which are named themselves; "" for any other."""
    names = os.listdir(folder)
    for suffix in (".tar", ".parquet"):
        if any(name.endswith(suffix) for name in names):
            return f"name the files in it: {quoted(os.path.join(folder, ''))}*{suffix}"
    return "decompress the tar files in it, and name them" if any(map(is_shard, names)) else ""


def _of_shard(path: str, classes: Sequence[str]) -> Iterator[Labelled]:
    rows = manifest.index([path], progress=False, allow_empty_classes=True)
    names = list(rows.classes)
    numbered = names == [str(number) for number in range(len(names))]
    positions_N = _in_model(None if numbered else names, rows.label_N, classes, path)
    with open(path, "rb") as tar:
        for row, label in enumerate(positions_N.tolist()):
            data = os.pread(tar.fileno(), int(rows.size_N[row]), int(rows.offset_N[row]))
            yield Labelled(Input(f"{printable(path)}/{printable(rows.key(row))}", data), label)


def _of_parquet(path: str, classes: Sequence[str], label_column: str) -> Iterator[Labelled]:
    with open_parquet(Path(path)) as file:
        images = image_column(file.schema_arrow, path)
    read = read_labels([Path(path)], images, label_column)
    names = [name for name in read.classes if name is not None]
    positions_N = _in_model(names or None, read.files[0], classes, path)
    for image, label in zip(expand([path]), positions_N.tolist(), strict=True):
        yield Labelled(image, label)


def _in_model(
    names: Sequence[str] | None, label_N: np.ndarray, classes: Sequence[str], path: str
) -> np.ndarray:
    """Positions of the labels among the model's classes, int64 [N]; ``names`` None: only numbered."""
    used = np.unique(label_N).tolist()
    if names is None:
        place = _numbered(classes, path)
        if not place:
            return _by_number(label_N, classes, path)
        names = [str(label) for label in range(max(used) + 1)]
    else:
        place = {plain(name): number for number, name in enumerate(classes)}
        place |= {name: number for number, name in enumerate(classes)}
    known = [place.get(name, place.get(plain(name), -1)) for name in names]
    unknown = [names[label] for label in used if known[label] < 0]
    if unknown:
        images = int(np.isin(label_N, [n for n, name in enumerate(names) if name in unknown]).sum())
        some = ", ".join(f"'{name}'" for name in unknown[:_SHOWN])
        raise UserError(
            f"{len(unknown)} of the {len(used)} classes here, with {images:,} images, are not the model's: {some}"
            f"{', …' if len(unknown) > _SHOWN else ''}; it has "
            + ", ".join(f"'{name}'" for name in classes[:_SHOWN])
            + (", …" if len(classes) > _SHOWN else ""),
            where=printable(path),
            remedy="leave these images out, or rename their classes as the model names them; "
            "`cnn2gnn memory add` gives a model new classes",
        )
    return np.array(known, np.int64)[label_N]


def _numbered(classes: Sequence[str], path: str) -> dict[str, int]:
    """Places of the classes that have their place for a name, also if it is padded, by that number.

    Classes that were added may be named by words.

    Raises:
        UserError: one is named by another number.
    """
    numbers = [place for place, name in enumerate(classes) if name.strip().isdecimal()]
    other = [place for place in numbers if int(classes[place]) != place]
    # Each file's labels alone would say one or the other, and two files of a set might differ.
    if other:
        raise UserError(
            "the classes here are only numbered, and names of the model's classes are other numbers: whether a label "
            f"is one of these names or a place among them ('{classes[other[-1]]}' has place {other[-1]}) is not known",
            where=printable(path),
            remedy="name the classes, for example by a folder of images for each: FOLDER/CLASS/IMAGE",
        )
    return {str(place): place for place in numbers}


def _by_number(label_N: np.ndarray, classes: Sequence[str], path: str) -> np.ndarray:
    highest = int(label_N.max())
    if highest >= len(classes):
        raise UserError(
            f"there is a label {highest}, but the model has {len(classes)} classes, numbered from 0",
            where=printable(path),
            remedy="use the labels that the model was trained with, or name the classes",
        )
    _log.warning(
        f"{printable(path)}: classes are numbered, not named; they are taken in the model's order: "
        + ", ".join(f"{number} = {name}" for number, name in enumerate(classes[:_SHOWN]))
        + (", …" if len(classes) > _SHOWN else "")
    )
    return label_N.astype(np.int64)
