"""A look at the images of a source: classes, counts, sizes, formats, and what cannot be read."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cnn2gnn_dist.commands.init.columns import (
    check_columns,
    find_columns,
    guessed_labels,
    labels_in,
)
from cnn2gnn_dist.commands.init.sources import Source
from cnn2gnn_dist.data.images.decode import CorruptSample, decode
from cnn2gnn_dist.data.images.formats import image_suffix
from cnn2gnn_dist.data.images.image_files import CORRUPT, find_images, printable, unreadable
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, render
from cnn2gnn_dist.data.index.class_matching import ClassInfo, match, refuse_spellings
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.index.manifest_pair import index_data_set
from cnn2gnn_dist.data.packing.parquet import open_parquet, read_column
from cnn2gnn_dist.data.storage.shard_paths import files_of
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.stages.prepare import check_tree

SAMPLE = 400
"""Most images that are decoded."""
SAMPLE_BYTES = 128 << 20
SHARDS = 32
"""Most shards that are indexed; from these the counts are extrapolated."""
_KEPT = 200  # images kept decoded in clean views, for mean, std and timing


@dataclass
class Survey:
    """What was seen of a data set.

    Attributes:
        source: where it is.
        classes: names of the classes.
        count_C: training images of each class, before any are split off.
        sampled: whether only some shards were read: counts are estimates, and a class may be in the others.
        held: images of the held-out part; None: there is none.
        sides: (height, width) of the decoded images, int [n, 2].
        grey: share of them whose channels are equal.
        formats: format → decoded images.
        looked_at: images whose bytes were read.
        unreadable: reason → images; ``share`` of all of them.
        columns: names of a Parquet file's columns of images and labels.
        guess: why that column of labels was taken, if neither its name nor the file says that it holds the classes.
        notes: what the user should know.
        sample: encoded images.
    """

    source: Source
    classes: list[str]
    count_C: np.ndarray
    sampled: bool = False
    held: int | None = None
    sides: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    grey: float = 0.0
    formats: Counter[str] = field(default_factory=Counter)
    looked_at: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    share: float = 0.0
    columns: tuple[str, str] = ("image", "label")
    guess: str = ""
    notes: list[str] = field(default_factory=list)
    sample: list[bytes] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Training images, before any are split off."""
        return int(self.count_C.sum())

    @property
    def empty(self) -> list[str]:
        """Names of the classes without a training image (of those that were read)."""
        return [self.classes[number] for number in np.flatnonzero(self.count_C == 0)]

    @property
    def short_side(self) -> int:
        """The median shorter side, in pixels."""
        return int(np.median(self.sides.min(axis=1)))


def look(source: Source, seed: int = 0, label_column: str | None = None) -> Survey:
    """Read names and labels of all images, and decode a sample of them.

    Args:
        source: where they are.
        seed: of the sample.
        label_column: of Parquet files; None: found by its name or type.

    Raises:
        UserError: the images can't be trained on: one class only, none that can be read, labels missing.
    """
    rng = np.random.default_rng(seed)
    if source.kind == "parquet":
        survey = _parquet(source, rng, label_column)
    elif label_column is not None:
        raise UserError(
            "only Parquet files have columns",
            where=f"--label-column {label_column}",
            remedy="leave it out",
        )
    else:
        survey = (_folder if source.kind == "imagefolder" else _shards)(source, rng)
    _refuse_few(survey)
    if survey.guess:
        survey.notes.append(survey.guess)
    if source.note:
        survey.notes.append(source.note)
    if source.unused:
        names = ", ".join(f"'{printable(name)}'" for name in source.unused[:4])
        survey.notes.append(f"not used: {names}{', …' if len(source.unused) > 4 else ''}")
    return survey


def _refuse_few(survey: Survey) -> None:
    where = str(survey.source.train)
    if survey.looked_at and not len(survey.sides):
        reason = survey.unreadable.most_common(1)[0][0]
        raise UserError(
            f"none of {survey.looked_at} images can be read; the most frequent reason: {reason}",
            where=where,
            remedy="convert them to JPEG or PNG",
        )
    filled = int((survey.count_C > 0).sum())
    if filled < 2:
        name = survey.classes[int(survey.count_C.argmax())] if len(survey.classes) else ""
        raise UserError(
            f"all {survey.images} images are of one class ('{name}'): there is nothing to distinguish",
            where=where,
            remedy="add a folder of images of another class"
            if survey.source.kind == "imagefolder"
            else "name images of at least two classes",
        )
    if survey.held is None and survey.count_C.max() < 2:
        raise UserError(
            "every class has a single image, so none can be held out to evaluate on",
            where=where,
            remedy="add images, at least ten of each class",
        )
    if survey.empty and not survey.sampled:  # else their images may be in the other shards
        names = ", ".join(f"'{printable(name)}'" for name in survey.empty[:4])
        survey.notes.append(
            f"{len(survey.empty)} classes have no training images and can't be learned: {names}"
            f"{', …' if len(survey.empty) > 4 else ''}"
        )
    least = int(survey.count_C[survey.count_C > 0].min())
    if least < 10:
        survey.notes.append(
            f"the smallest class has {'about ' * survey.sampled}{least} image{'s' * (least > 1)}: little can be "
            "learned from so few"
        )


def _folder(source: Source, rng: np.random.Generator) -> Survey:
    survey = _tree(str(source.train))
    if source.test is not None:
        held = _tree(str(source.test))
        survey.held = int(held.count_C.sum())
        _check_held(_named(survey.classes), _named(held.classes), range(len(held.classes)))
    survey.source = source
    root = Path(str(source.train))
    names = find_images(root, classes=True).images
    wrong = unreadable(root, names)
    order = rng.permutation(len(names))

    def read() -> Iterator[bytes]:
        for number in order:
            if names[number] not in wrong:
                yield (root / names[number]).read_bytes()

    _decode(survey, read())
    decoded = survey.looked_at
    broken = sum(survey.unreadable.values())
    survey.looked_at = max(decoded, len(names))
    survey.share = (len(wrong) + broken / max(1, decoded) * (len(names) - len(wrong))) / len(names)
    survey.unreadable.update(Counter(wrong.values()))
    return survey


def _tree(folder: str) -> Survey:
    check_tree(Path(folder))
    found = find_images(folder, classes=True)
    number = {name: i for i, name in enumerate(found.folders)}
    labels = [number[image.split(os.sep)[0]] for image in found.images]
    count_C = np.bincount(np.asarray(labels, np.int64), minlength=len(number))
    empty = [name for name, count in zip(found.folders, count_C, strict=True) if not count]
    if empty:
        raise UserError(
            f"{len(empty)} class folder{'s' * (len(empty) > 1)} hold{'s' * (len(empty) == 1)} no image: "
            f"'{printable(empty[0])}'",
            where=printable(os.path.join(folder, empty[0])),
            remedy="add images or remove the folder",
        )
    survey = Survey(Source("imagefolder", folder), [printable(n) for n in found.folders], count_C)
    left_out = {k: v for k, v in found.left_out.items() if k != CORRUPT}
    if left_out:
        survey.notes.append(f"left out: {found.summary()}")
    return survey


def _parquet(source: Source, rng: np.random.Generator, label_column: str | None) -> Survey:
    paths = [Path(path) for path in files_of("parquet", source.train)]
    columns, guessed = find_columns(paths[0], label_column)
    check_columns(paths, columns, paths[0])
    labels = guessed_labels(paths, columns) if guessed else labels_in(paths, columns)
    label_N = np.concatenate(labels.files)
    names = [str(name or number) for number, name in enumerate(labels.classes)]
    survey = Survey(source, names, np.bincount(label_N, minlength=len(names)), columns=columns)
    if guessed:
        survey.guess = (
            f"the classes are read from column '{printable(columns[1])}', the only one of a type that labels have; "
            "if they are in another, name it: --label-column NAME"
        )
    if source.test is not None:
        test = [Path(path) for path in files_of("parquet", source.test)]
        check_columns(test, columns, paths[0])
        held = labels_in(test, columns)
        survey.held = sum(map(len, held.files))
        _check_held(_named(labels.classes), _named(held.classes), np.concatenate(held.files))
    _decode(survey, _rows(paths, columns[0], rng))
    survey.share = sum(survey.unreadable.values()) / survey.looked_at
    return survey


def _named(names: Sequence[str | None]) -> ClassInfo:
    return ClassInfo({n: name for n, name in enumerate(names) if name is not None}, len(names))


def _check_held(train: ClassInfo, held: ClassInfo, labels: Iterable[int]) -> None:
    """Refuse what the stage ``index`` would refuse: held-out classes that can't be matched.

    Raises:
        UserError: a class has no counterpart among the training classes.
    """
    refuse_spellings(train, "data.train")
    refuse_spellings(held, "data.test")
    match(train, held, {int(label) for label in labels if label >= 0})


def _rows(paths: list[Path], column: str, rng: np.random.Generator) -> Iterator[bytes]:
    """The first images of some row groups, which are drawn with equal probabilities."""
    groups = []
    for path in paths:
        with open_parquet(path) as file:
            groups += [(path, group) for group in range(file.num_row_groups)]
    chosen = [groups[i] for i in sorted(rng.permutation(len(groups))[:8])]
    each = -(-SAMPLE // len(chosen))
    for path, group in chosen:
        left = each
        for images in read_column(path, column, 64, [group]):
            for image in images[:left]:
                data = image["bytes"] if isinstance(image, dict) else image
                if not data:
                    raise UserError(
                        "a row has no image bytes",
                        where=str(path),
                        remedy="save the data set with the images embedded, without empty rows",
                    )
                yield data
            left -= len(images)
            if left <= 0:
                break


def _shards(source: Source, rng: np.random.Generator) -> Survey:
    paths = files_of("shards", source.train)
    some = paths
    if len(paths) > SHARDS:
        some = [paths[i] for i in sorted(rng.permutation(len(paths))[:SHARDS])]
    found = index_data_set(some, allow_empty_classes=True)
    manifest = found.manifest
    count_C = np.bincount(manifest.label_N[manifest.label_N >= 0], minlength=manifest.num_classes)
    survey = Survey(source, list(manifest.classes), count_C)
    if len(some) < len(paths):
        survey.count_C = np.ceil(count_C * (len(paths) / len(some))).astype(np.int64)
        survey.sampled = True
        survey.notes.append(
            f"{len(some)} of {len(paths)} shards were read: the counts are estimates"
        )
    if found.left_out:
        survey.notes.append(found.left_out)
    if source.test is not None:
        held = index_data_set(files_of("shards", source.test), allow_empty_classes=True)
        survey.held = len(held.manifest)
        if len(some) == len(paths):  # else a class may be in the others
            _check_held(found.class_info, held.class_info, held.manifest.label_N)
    _decode(survey, _members(manifest, rng))
    survey.share = sum(survey.unreadable.values()) / survey.looked_at
    return survey


def _members(manifest: Manifest, rng: np.random.Generator) -> Iterator[bytes]:
    for row in rng.permutation(len(manifest))[:SAMPLE]:
        with open(manifest.shards[manifest.shard_N[row]].path, "rb") as file:
            file.seek(int(manifest.offset_N[row]))
            yield file.read(int(manifest.size_N[row]))


def _decode(survey: Survey, images: Iterator[bytes]) -> None:
    """Decode up to SAMPLE images, and record sizes, formats and errors in the survey."""
    sides, grey, seen = [], 0, 0
    for data in images:
        survey.looked_at += 1
        try:
            image_HWC = decode(data)
            sides.append(image_HWC.shape[:2])
            grey += bool((image_HWC == image_HWC[..., :1]).all())
            survey.formats[image_suffix(data) or "?"] += 1
            survey.sample.append(data)
        except CorruptSample as error:
            survey.unreadable[str(error)] += 1
        seen += len(data)
        if survey.looked_at >= SAMPLE or seen >= SAMPLE_BYTES:
            break
    survey.sides = np.array(sides, np.int64).reshape(-1, 2)
    survey.grey = grey / max(1, len(sides))


def measure_views(
    survey: Survey, spec: ViewSpec, now: Callable[[], float] = time.perf_counter
) -> tuple[list[float], list[float], float, float]:
    """Mean and std of each channel in clean views, and seconds to decode and to render an image."""
    spent, rendered, views = 0.0, 0.0, []
    for number, data in enumerate(survey.sample[:_KEPT]):
        began = now()
        image_HWC = decode(data)
        between = now()
        try:
            render(spec, image_HWC, number, 0)
            rendered += now() - between
            views.append(render(spec, image_HWC, number, CLEAN))
        except CorruptSample:  # too narrow; training counts it as corrupt
            continue
        finally:
            spent += between - began
    pixels = np.concatenate([view.reshape(-1, 3) for view in views]).astype(np.float64) / 255
    count = len(survey.sample[:_KEPT])
    std = np.maximum(pixels.std(axis=0), 0.02)
    return pixels.mean(axis=0).tolist(), std.tolist(), spent / count, rendered / count
