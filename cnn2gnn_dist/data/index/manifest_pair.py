"""Manifests of training and held-out images with the same classes, numbered identically."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cnn2gnn_dist.data.index.build import gather
from cnn2gnn_dist.data.index.class_matching import (
    ClassInfo,
    case_note,
    check_count,
    class_names,
    match,
    notes,
    number_note,
    refuse_empty_classes,
    refuse_spellings,
)
from cnn2gnn_dist.data.index.manifest import Manifest, manifest_of, refuse_none
from cnn2gnn_dist.errors import UserError


@dataclass(frozen=True)
class IndexedDataSet:
    """A manifest, the classes of its shards, and a note for the user on left-out members."""

    manifest: Manifest
    class_info: ClassInfo
    left_out: str | None


def index_data_set(
    shards: Sequence[Path | str],
    *,
    num_classes: int | None = None,
    allow_empty_classes: bool = False,
    checksums: bool = False,
    unlabelled: bool = False,
) -> IndexedDataSet:
    """Index a data set of ``num_classes`` classes, however many of them have names; see :func:`index`.

    ``unlabelled``: accept samples without a label.

    Raises:
        UserError: as :func:`index`; there are more classes than ``num_classes``; one class name has
            two spellings.
    """
    refuse_none(shards)
    found = gather(
        shards, num_classes=num_classes, checksums=checksums, require_labels=not unlabelled
    )
    class_info = found.class_info
    refuse_spellings(class_info, "data.train")
    if num_classes is not None:
        if class_info.count > num_classes:
            raise UserError(
                f"the data has {class_info.count} classes, but data.num_classes is {num_classes}",
                where="data.num_classes",
                remedy=f"set data.num_classes={class_info.count}, or omit it to read it from the "
                "data",
            )
        check_count(num_classes, len(found.keys), "data.num_classes")
        class_info = ClassInfo(class_info.names, num_classes)
    names, label_N = class_names(class_info), found.columns["label_N"]
    if not allow_empty_classes:
        refuse_empty_classes(label_N, names, numbered=not class_info.names)
    return IndexedDataSet(
        manifest_of(found, names, label_N), class_info, found.skipped.note("data.train")
    )


@dataclass(frozen=True)
class IndexedPair:
    """Manifests of training and held-out images with the same classes, and notes for the user."""

    train: Manifest
    held: Manifest
    notes: list[str]


def index_pair(
    train: Sequence[Path | str],
    held: Sequence[Path | str],
    *,
    num_classes: int | None = None,
    match_classes: Literal["name", "number"] = "name",
    allow_empty_classes: bool = False,
    checksums: bool = False,
    unlabelled: bool = False,
) -> IndexedPair:
    """Index two data sets that have the same classes but may number them differently.

    The held-out labels are converted to the training images' numbering, by name where names exist
    (see :func:`cnn2gnn_dist.data.index.class_matching.match`). Shards are not changed.

    Args:
        train: shards of the training images.
        held: shards of the held-out images.
        num_classes: the number of classes; None: as the training images imply.
        match_classes: "number" assumes that both sets number their classes identically.
        allow_empty_classes: accept classes without a training image.
        checksums: as for :func:`index`.
        unlabelled: accept training images without a label.

    Raises:
        UserError: as :func:`index`; a held-out class is not a training class, or its name is
            ambiguous.
    """
    whole = index_data_set(
        train,
        num_classes=num_classes,
        allow_empty_classes=allow_empty_classes,
        checksums=checksums,
        unlabelled=unlabelled,
    )
    refuse_none(held)
    found = gather(held, checksums=checksums)
    refuse_spellings(found.class_info, "data.test")
    label_N = found.columns["label_N"]
    to_C = match(whole.class_info, found.class_info, np.unique(label_N).tolist(), match_classes)
    matched_N = to_C[label_N]
    said = notes(
        whole.class_info, whole.manifest.label_N, matched_N, bool((matched_N != label_N).any())
    )
    more = (
        whole.left_out,
        found.skipped.note("data.test"),
        number_note(whole.class_info, found.class_info, to_C, match_classes),
        case_note(found.class_info),
    )
    said += [note for note in more if note and note not in said]
    return IndexedPair(whole.manifest, manifest_of(found, whole.manifest.classes, matched_N), said)
