"""From shards to the manifest's rows: image, label and class name of each sample."""

from __future__ import annotations

import json
import os
import re
from collections import Counter

import numpy as np

from cnn2gnn_dist.data.tar import Member, TarSample, samples
from cnn2gnn_dist.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff")
COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "row_in_shard": np.int32,
}

_CLASS_NUMBER = re.compile(rb"\s*([0-9]{1,9})\s*")


class Rows:
    """Collects the columns shard by shard, and a name for each label met."""

    def __init__(self, classes: tuple[str, ...] | None, require_labels: bool) -> None:
        self.classes = classes
        self.require_labels = require_labels
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self.keys: list[str] = []
        self.names: dict[int, str | None] = {}

    def column(self, name: str) -> np.ndarray:
        """Return a column of all rows so far, [N]."""
        return np.concatenate(self.parts[name])

    def add(self, number: int, path: str) -> tuple[int, int]:
        """Append the rows of a shard; return its length in bytes and its number of samples."""
        listed = list(samples(path))
        if not listed:
            raise UserError(
                "The shard holds no samples.",
                where=path,
                remedy="Name members KEY.jpg and KEY.cls (webdataset's convention).",
            )
        images = [_image(path, sample) for sample in listed]
        fd = os.open(path, os.O_RDONLY)
        try:
            labels = [self._label(path, fd, sample) for sample in listed]
            length = os.fstat(fd).st_size
        finally:
            os.close(fd)
        values = {
            "shard": [number] * len(listed),
            "offset": [image.offset for image in images],
            "size": [image.size for image in images],
            "label": labels,
            "row_in_shard": range(len(listed)),
        }
        for name, kind in COLUMNS.items():
            self.parts[name].append(np.asarray(values[name], kind))
        self.keys += [sample.key for sample in listed]
        return length, len(listed)

    def _label(self, path: str, fd: int, sample: TarSample) -> int:
        member = sample.fields.get("cls")
        if member is None:
            if self.require_labels:
                raise UserError(
                    f"Sample '{sample.key}' has no label.",
                    where=path,
                    remedy=f"Add a member '{sample.key}.cls' with the number of its class.",
                )
            return -1
        text = os.pread(fd, min(member.size, 64), member.offset)
        match = _CLASS_NUMBER.fullmatch(text)
        if match is None:
            raise UserError(
                f"The label of sample '{sample.key}' is no class number: {text[:24]!r}.",
                where=f"{path}, member '{member.name}'",
                remedy="A .cls member holds the number of the class in ASCII digits, from 0.",
            )
        label = int(match.group(1))
        if self.classes is not None and label >= len(self.classes):
            raise UserError(
                f"The label of sample '{sample.key}' is {label}; "
                f"there are {len(self.classes)} classes, numbered from 0.",
                where=f"{path}, member '{member.name}'",
                remedy="Correct the label or the list of classes.",
            )
        if self.classes is None and label not in self.names:
            self.names[label] = _class_name(fd, sample)
        return label


def _image(path: str, sample: TarSample) -> Member:
    """Return the image of a sample; of several formats the first of IMAGE_SUFFIXES."""
    for suffix in IMAGE_SUFFIXES:
        if member := sample.fields.get(suffix):
            if member.size >= 1 << 31:
                break
            return member
    fields = ", ".join(f".{suffix}" for suffix in sample.fields)
    raise UserError(
        f"Sample '{sample.key}' has no image (its fields: {fields}).",
        where=path,
        remedy=f"Add one as '{sample.key}.jpg' or .{', .'.join(IMAGE_SUFFIXES[1:4])}, below 2 GiB; "
        "keys end at the first dot of the file name.",
    )


def _class_name(fd: int, sample: TarSample) -> str | None:
    member = sample.fields.get("json")
    if member is None:
        return None
    try:
        name = json.loads(os.pread(fd, member.size, member.offset))["class_name"]
    except (ValueError, KeyError, TypeError):  # a json of another make is no fault
        return None
    return name if isinstance(name, str) else None


def class_names(label_N: np.ndarray, found: dict[int, str | None]) -> tuple[str, ...]:
    """Name the classes 0..max; two of one name (ImageNet has two cranes) get their number added."""
    count = int(label_N.max(initial=-1)) + 1
    if count > max(1 << 20, len(label_N)):  # a stray 999999999 should not make that many names
        raise UserError(
            f"The highest label is {count - 1:,}, with {len(label_N):,} samples.",
            remedy="Number the classes from 0 without gaps, or give the class names.",
        )
    names = [found.get(label) or str(label) for label in range(count)]
    repeated = {name for name, times in Counter(names).items() if times > 1}
    return tuple(
        f"{name} ({label})" if name in repeated else name for label, name in enumerate(names)
    )
