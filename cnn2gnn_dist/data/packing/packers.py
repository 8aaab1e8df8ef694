"""Packers: convert image data sets to WebDataset shards for streaming.

Encoded images pass through unchanged, arrays are written as PNG, and the output is deterministic.
Every packer takes ``limit`` (the maximum number of samples) and returns the paths of the shards.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.images.formats import IMAGE_SUFFIXES, image_suffix, what_it_is
from cnn2gnn_dist.data.images.image_files import (
    CORRUPT,
    FolderScan,
    find_images,
    printable,
    unreadable,
)
from cnn2gnn_dist.data.packing.parquet import read_column, read_labels
from cnn2gnn_dist.data.packing.shard_writer import NewSample, encode_png, write_shards
from cnn2gnn_dist.errors import UserError

_log = logging.getLogger(__name__)


def pack_digits(
    out: str | os.PathLike[str],
    *,
    shard_size: int = 512,
    image_size: int = 32,
    prefix: str = "digits",
    limit: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Pack scikit-learn's 1,797 handwritten digits: classes '0' to '9', no download.

    The 8×8 gray images (0..16) are upsampled (bicubic) to ``image_size`` and converted to RGB.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    count = _limited(len(grey_NHW), limit)

    def sources() -> Iterator[NewSample]:
        for number, (grey_HW, label) in enumerate(zip(grey_NHW, digits.target, strict=True)):
            small = Image.fromarray(grey_HW)
            large = small.resize((image_size, image_size), Image.Resampling.BICUBIC)
            image = encode_png(np.asarray(large.convert("RGB")))
            yield NewSample(f"{prefix}-{number:05d}", image, "png", int(label))

    return write_shards(
        islice(sources(), count),
        count,
        out,
        prefix=prefix,
        shard_size=shard_size,
        classes=[str(name) for name in digits.target_names],
        progress=progress,
    )


def pack_parquet(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    shard_size: int = 10_000,
    prefix: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    limit: int | None = None,
    progress: bool = True,
    unlabelled: bool = False,
) -> list[Path]:
    """Pack Parquet files in Hugging Face's image layout, row by row, in file order.

    Args:
        files: Parquet files with ``image`` (struct<bytes, path> or binary) and ``label``: integers,
            named by the schema metadata ``huggingface`` (ClassLabel) if present, or text, the names
            themselves. Files that number the same names differently are renumbered.
        out: folder of the shards.
        shard_size: samples per shard.
        prefix: prefix of the names of shards and samples; use one per split.
        image_column: name of the image column.
        label_column: name of the label column.
        limit: maximum number of rows to pack.
        progress: show a progress bar when on a terminal.
        unlabelled: accept rows without a label (null, -1).

    Raises:
        UserError: a file is missing or not Parquet; a column is missing (the message suggests the
            likely one) or has another type; files name different classes; a row has no image, or no
            label within the classes.
    """
    paths = [Path(files)] if isinstance(files, str | os.PathLike) else [Path(f) for f in files]
    if not paths:
        raise UserError("there are no rows to pack", remedy="name at least one Parquet file")
    labels = read_labels(paths, image_column, label_column, unlabelled)
    count = _limited(sum(map(len, labels.files)), limit)
    return write_shards(
        islice(_parquet_sources(paths, labels.files, prefix, image_column), count),
        count,
        out,
        prefix=prefix,
        shard_size=shard_size,
        classes=labels.classes,
        progress=progress,
    )


def _parquet_sources(
    paths: Sequence[Path], labels: Sequence[np.ndarray], prefix: str, image_column: str
) -> Iterator[NewSample]:
    number = 0
    for path, label_N in zip(paths, labels, strict=True):
        row = 0
        for images in read_column(path, image_column):
            for image in images:
                data, name = image, ""
                if isinstance(image, dict):
                    data, name = image["bytes"], image.get("path") or ""
                if not data:
                    raise UserError(
                        f"row {row} has no image bytes"
                        + (f", only the path '{name}'" if name else ""),
                        where=str(path),
                        remedy="save the data set with the images embedded",
                    )
                about = {"filename": name} if name else {}
                suffix = _suffix(data, name, f"{path}, row {row}")
                yield NewSample(f"{prefix}-{number:08d}", data, suffix, int(label_N[row]), about)
                row += 1
                number += 1


def _suffix(data: bytes, name: str, where: str) -> str:
    """Return the suffix from the first bytes (ImageNet has a PNG named .JPEG), else from the name."""
    named = Path(name).suffix.lower().lstrip(".")
    suffix = image_suffix(data) or (named if named in IMAGE_SUFFIXES else None)
    if suffix is None:
        raise UserError(
            f"the bytes are not a supported image: {what_it_is(data)}",
            where=where,
            remedy=f"remove it, or convert it to one of: {', '.join(IMAGE_SUFFIXES)}",
        )
    return suffix


def pack_imagefolder(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    shard_size: int = 10_000,
    prefix: str = "train",
    seed: int = 0,
    limit: int | None = None,
    max_corrupt: float = 0.001,
    progress: bool = True,
) -> list[Path]:
    """Pack a tree ``root/CLASS/…/IMAGE``: the classes are the sorted names of root's folders.

    :mod:`cnn2gnn_dist.data.images.image_files` defines which files are images; files left out are
    reported in one line and recorded in ``PREFIX-left-out.json``. Images are written in shuffled order
    (by ``seed``), since shards of a single class would mix poorly while streaming. Keys are derived
    from the paths.

    Args:
        root: the tree.
        out: folder of the shards.
        shard_size: samples per shard.
        prefix: prefix of the names of shards; use one per split.
        seed: seed of the shuffle.
        limit: maximum number of images to pack.
        max_corrupt: maximum fraction of images whose first bytes are not an image's; these are left out.
        progress: show a progress bar when on a terminal.

    Raises:
        UserError: root is missing, not fully readable or has no folders; a class has no images; too
            many files with image names are not images.
    """
    base = Path(root)
    found = _images_by_class(base, max_corrupt)
    labels = _class_numbers(base, found)
    keys = _path_keys([Path(image) for image in found.images])
    count = _limited(len(found.images), limit)
    order = np.random.default_rng(seed).permutation(len(found.images))[:count]

    def sources() -> Iterator[NewSample]:
        for i in order:
            image = found.images[i]
            data = _bytes_of(base / image)
            about = {"filename": printable(Path(image).as_posix())}
            suffix = _suffix(data, image, printable(base / image))
            yield NewSample(keys[i], data, suffix, labels[i], about)

    shards = write_shards(
        sources(),
        count,
        out,
        prefix=prefix,
        shard_size=shard_size,
        classes=[printable(name) for name in found.folders],
        progress=progress,
    )
    durable.write_json(Path(out) / f"{prefix}-left-out.json", found.record())
    if found.left_out:
        _log.warning(f"{prefix}: {len(labels)} images; left out: {found.summary()}")
    return shards


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:  # its first bytes could be read
        raise UserError(
            f"an image can't be read: {error.strerror}",
            where=printable(path),
            remedy="check the disk or the network file system that holds it, and run the same command again",
        ) from None


def _images_by_class(base: Path, max_corrupt: float) -> FolderScan:
    """Find the images below the class folders, except those whose bytes are not an image's."""
    if not base.is_dir():
        raise UserError("there is no such folder", where=str(base), remedy="check the path")
    found = find_images(base, classes=True)
    if not found.folders:
        there = f"; it contains: {found.summary()}" if found.left_out else ""
        raise UserError(
            f"the folder contains no class folders{there}",
            where=str(base),
            remedy="use the layout FOLDER/CLASS/IMAGE",
        )
    _leave_out_corrupt(base, found, max_corrupt)
    return found


def _leave_out_corrupt(base: Path, found: FolderScan, max_corrupt: float) -> None:
    """Leave out files with image names that are not images; refuse if there are too many."""
    wrong = unreadable(base, found.images)
    total = len(found.images)
    if len(wrong) > max_corrupt * total:
        some = "; ".join(f"{printable(name)}: {what}" for name, what in list(wrong.items())[:5])
        share = math.ceil(len(wrong) / total * 1000) / 1000
        classes = {image.split(os.sep)[0] for image in found.images}
        whole = {image.split(os.sep)[0] for image in found.images if image not in wrong}
        remedy = "fix or remove these files"
        if whole == classes:  # else a class would have no image left
            remedy += f", or set data.max_corrupt={share:g} to leave them out"
        raise UserError(
            f"{len(wrong)} corrupt image{'s' * (len(wrong) > 1)} among {total}, more than the "
            f"limit of {max_corrupt:.2%}: {some}",
            where=str(base),
            remedy=remedy,
        )
    found.images = [image for image in found.images if image not in wrong]
    for name, what in wrong.items():
        found.leave(CORRUPT, f"{name}: {what}")


def _class_numbers(base: Path, found: FolderScan) -> list[int]:
    """Return the class of each image, as the number of its folder."""
    numbers = {name: number for number, name in enumerate(found.folders)}
    labels = [numbers[image.split(os.sep)[0]] for image in found.images]
    empty = set(found.folders) - {found.folders[label] for label in set(labels)}
    if empty:
        name = min(empty)
        inside = FolderScan(
            left_out={
                reason: kept
                for reason, paths in found.left_out.items()
                if (kept := [path for path in paths if path.split(os.sep)[0] == name])
            }
        )
        raise UserError(
            f"class '{printable(name)}' has no images"
            + (f", only {inside.summary()}" if inside.left_out else ""),
            where=printable(base / name),
            remedy=f"add images ({', '.join(IMAGE_SUFFIXES)}) or remove the folder",
        )
    if len({printable(name) for name in found.folders}) < len(found.folders):
        raise UserError(
            "two class folders have the same name when encoded as UTF-8",
            where=str(base),
            remedy="rename one of them",
        )
    return labels


def _path_keys(paths: Sequence[Path]) -> list[str]:
    """Make a key from each path, without the dots and slashes that end or split keys."""
    used: dict[str, int] = {}
    keys = []
    for path in paths:
        plain = re.sub(r"[^\w-]", "_", path.with_suffix("").as_posix())
        key = plain
        while key in used:  # "a.b.jpg" and "a_b.jpg", "a.jpg" and "a.png"
            used[plain] += 1
            key = f"{plain}_{used[plain]}"
        used[key] = 1
        keys.append(key)
    return keys


def pack_torchvision(
    name: str,
    root: str | os.PathLike[str],
    train: bool,
    out: str | os.PathLike[str],
    *,
    shard_size: int = 10_000,
    prefix: str | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Pack torchvision's 'cifar10' or 'cifar100' as PNG, downloading it to ``root`` if missing.

    Raises:
        UserError: an unknown name; the data set is not at ``root`` and cannot be downloaded.
    """
    from cnn2gnn_dist.compat import import_torchvision

    kinds = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
    if name not in kinds:
        raise UserError(
            f"torchvision's '{name}' cannot be packed",
            remedy=f"choose one of: {', '.join(kinds)}; or pack its images as a folder tree",
        )
    kind = getattr(import_torchvision().datasets, kinds[name])
    try:
        dataset = kind(str(root), train=train, download=True)  # no download if it is there
    except (OSError, RuntimeError) as failure:  # URLError is an OSError; RuntimeError: bad checksum
        raise UserError(
            f"{kinds[name]} is missing and cannot be downloaded: {failure}",
            where=str(root),
            remedy="on a machine with network access, download "
            f"{getattr(kind, 'url', kinds[name])} and put the file into this folder; or pack it "
            "from Parquet",
        ) from failure
    begin = prefix or ("train" if train else "test")
    count = _limited(len(dataset.targets), limit)

    def sources() -> Iterator[NewSample]:
        for number in range(count):
            image = encode_png(np.asarray(dataset.data[number]))
            yield NewSample(f"{begin}-{number:08d}", image, "png", int(dataset.targets[number]))

    return write_shards(
        sources(),
        count,
        out,
        prefix=begin,
        shard_size=shard_size,
        classes=list(dataset.classes),
        progress=progress,
    )


def _limited(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)
