"""Class names and counts of data sets, and matching of the classes of two data sets.

A data set numbers its classes and may name them. Two data sets may number the same classes
differently, so classes are matched by name wherever names exist, and never silently by number where
only one side has names. Pure functions: labels and names in, labels and names out.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cnn2gnn_dist.data.tar.tar_file import shown
from cnn2gnn_dist.errors import UserError

MOST = 1 << 20
"""A data set with more classes than this must have at least as many samples; else a label is an outlier."""
_LISTED = 5


@dataclass(frozen=True)
class ClassInfo:
    """The class names and class count of a data set.

    Attributes:
        names: class number → name, for the classes that have one.
        count: number of classes: as a list declares, or as the highest label implies.
    """

    names: Mapping[int, str]
    count: int


def check_count(count: int, samples: int, where: str = "") -> None:
    """Check that labels are class numbers and not ids of some kind.

    Raises:
        UserError: they imply many more classes than there are samples.
    """
    if count > max(MOST, samples):
        raise UserError(
            f"the highest label is {count - 1:,}, with {samples:,} samples: labels must be class "
            "numbers starting at 0, but these look like ids",
            where=where,
            remedy="number the classes from 0 without gaps",
        )


def class_names(class_info: ClassInfo) -> tuple[str, ...]:
    """Return the names of classes 0..count; duplicates (ImageNet has two cranes) get their number appended."""
    names = [class_info.names.get(label) or str(label) for label in range(class_info.count)]
    repeated = {name for name, times in Counter(names).items() if times > 1}
    return tuple(
        f"{name} ({label})" if name in repeated else name for label, name in enumerate(names)
    )


def refuse_spellings(class_info: ClassInfo, where: str) -> None:
    """Refuse a data set that lists one class name in two spellings as two classes.

    Such names look alike, and across data sets they are considered equal (see :func:`match`). Names
    that are identical character by character are allowed: ImageNet has two cranes.

    Raises:
        UserError: it does; both spellings are shown.
    """
    spelled: dict[str, dict[str, int]] = defaultdict(dict)
    for label, name in class_info.names.items():
        spelled[plain(name)].setdefault(name, label)
    torn = [found for found in spelled.values() if len(found) > 1]
    if torn:
        one = ", ".join(f"{n} ({shown(ascii(name), 60)})" for name, n in torn[0].items())
        raise UserError(
            f"{len(torn)} class names appear in several spellings, each of which counts as a "
            f"separate class: classes {one}",
            where=where,
            remedy="use one spelling per class (blanks at the ends, or é as one code point or "
            "two, do not make a different name): rename or merge its folders or labels",
        )


def case_note(class_info: ClassInfo) -> str | None:
    """Return one sentence if names differ only by case, else None."""
    folded: dict[str, dict[str, None]] = defaultdict(dict)
    for name in class_info.names.values():
        folded[plain(name).casefold()][name] = None
    alike = [list(found) for found in folded.values() if len(found) > 1]
    if not alike:
        return None
    return (
        f"{len(alike)} class names differ from others only in case and count as separate classes: "
        + _quoted([name for names in alike for name in names])
    )


def refuse_empty_classes(label_N: np.ndarray, names: Sequence[str], numbered: bool = False) -> None:
    """Refuse labeled samples if a class has none.

    Args:
        label_N: class of each sample; -1: none.
        names: the class names.
        numbered: the classes have no names other than their numbers.

    Raises:
        UserError: a class has no sample; the message names it.
    """
    count_C = np.bincount(label_N[label_N >= 0], minlength=len(names))
    empty = np.flatnonzero(count_C == 0)
    if not len(empty) or not np.any(label_N >= 0):
        return
    allow = "allow it with data.allow_empty_classes=true (classes keep their numbers and names)"
    if numbered and empty.tolist() == [0]:
        raise UserError(
            f"1 of {len(names)} classes has no samples: 0; the labels start at 1",
            where="data.allow_empty_classes",
            remedy=f"number the classes from 0, in training and held-out images, or {allow}",
        )
    raise UserError(
        f"{len(empty)} of {len(names)} classes have no samples: {_listed(empty.tolist(), names)}",
        where="data.allow_empty_classes",
        remedy=f"add samples for them or, if they should have none, {allow}",
    )


def match(
    train: ClassInfo,
    held: ClassInfo,
    present: Iterable[int],
    by: Literal["name", "number"] = "name",
) -> np.ndarray:
    """Map each held-out class to its training class.

    Args:
        train: classes of the training images.
        held: classes of the held-out images.
        present: the held-out classes that have samples; the others need not be known.
        by: "number" assumes that both sets number their classes identically, whatever their names.

    Returns:
        int32 [held.count], -1 for classes that are not present.

    Raises:
        UserError: a class does not occur in the training images, or names are missing on one side
            or ambiguous.
    """
    labels = sorted(present)
    to = np.full(max([held.count, *(label + 1 for label in labels)]), -1, np.int32)
    for label, wanted in _matched(train, held, labels, by).items():
        to[label] = wanted
    return to


def _matched(train: ClassInfo, held: ClassInfo, labels: list[int], by: str) -> dict[int, int]:
    named = [label for label in labels if label in held.names]
    if not labels:
        return {}
    one = train.names or {label: held.names[label] for label in named}
    # A side without names, or whose names are its class numbers, is matched by number.
    numbered = not (train.names and named) and all(name == str(n) for n, name in one.items())
    if by == "number" or numbered:
        _refuse_beyond(labels, train)
        return {label: label for label in labels}
    if not (train.names and named):
        raise _one_sided(train, held, labels)
    places: dict[str, list[int]] = defaultdict(list)
    for number, name in train.names.items():
        places[plain(name)].append(number)
    times = Counter(plain(held.names[label]) for label in named)
    sure: dict[int, int] = {}
    twins: list[int] = []
    unknown: list[int] = []
    for label in named:
        found = places.get(plain(held.names[label]), [])
        if len(found) == 1 and times[plain(held.names[label])] == 1:
            sure[label] = found[0]
        else:
            (twins if found else unknown).append(label)
    alike = all(label == number for label, number in sure.items())
    if not (alike and sure):  # no evidence that both sides use the same numbers
        nameless: set[int] = set()
    else:
        nameless = set(range(train.count)) - set(train.names)
    unknown = [label for label in unknown if label not in nameless]
    if unknown:
        raise _unknown([held.names[label] for label in unknown], train)
    # A name shared by several classes is ambiguous: only the numbers can tell the classes apart, and
    # they do if all other names show that both sides use the same numbers.
    torn = [label for label in twins if not alike or label not in places[plain(held.names[label])]]
    if torn:
        raise _torn([held.names[label] for label in torn])
    rest = [label for label in labels if label not in held.names]
    if rest and not (alike and (sure or twins)):
        raise _one_sided(train, held, rest)
    _refuse_beyond(rest, train)
    return {label: sure.get(label, label) for label in labels}


def number_note(train: ClassInfo, held: ClassInfo, to_C: np.ndarray, by: str) -> str | None:
    """Return one sentence on held-out classes whose names had no counterpart to compare with, else None.

    Args:
        train: as for :func:`match`.
        held: as for :func:`match`.
        to_C: the result of :func:`match`.
        by: as for :func:`match`.
    """
    pairs = [(label, int(to)) for label, to in enumerate(to_C) if to >= 0]
    sides = [(held.names.get(label), train.names.get(to)) for label, to in pairs]
    if by == "name" and not (train.names and any(name is not None for name, _ in sides)):
        return None  # one side has only numbers, and the names of the other are those numbers
    bare = {
        to: str(name if name is not None else other)
        for (_, to), (name, other) in zip(pairs, sides, strict=True)
        if (name is None) != (other is None)
    }
    if not bare:
        return None
    listed = ", ".join(f"{n} ('{shown(name, 40)}')" for n, name in list(bare.items())[:_LISTED])
    return (
        f"{len(bare)} classes are matched by number because only one side names them: {listed}"
        f"{', …' if len(bare) > _LISTED else ''}"
    )


def notes(train: ClassInfo, train_N: np.ndarray, held_N: np.ndarray, moved: bool) -> list[str]:
    """Return notes for the user on two data sets whose labels use the same numbering.

    Args:
        train: classes of the training images.
        train_N: their labels.
        held_N: labels of the held-out images, in the training images' numbering.
        moved: the held-out classes were originally numbered differently.
    """
    names = class_names(train)
    said = []
    if moved:
        said.append("held-out images number the classes differently: matched by name")
    case = case_note(train)
    said += [case] if case else []
    twins = [name for name, times in Counter(train.names.values()).items() if times > 1]
    if twins:
        said.append(
            f"{len(twins)} names are shared by several classes, which are matched by number: "
            + _listed(range(len(twins)), twins)
        )
    count_C = np.bincount(train_N[train_N >= 0], minlength=len(names))
    held_C = np.bincount(held_N[held_N >= 0], minlength=len(names))
    unseen = np.flatnonzero((held_C > 0) & (count_C == 0))
    if len(unseen):
        said.append(
            f"{int(held_C[unseen].sum())} held-out images belong to classes without training "
            f"images and can't be recognized: {_listed(unseen.tolist(), names)}"
        )
    unjudged = np.flatnonzero((held_C == 0) & (count_C > 0))
    if len(unjudged) and len(held_N):
        said.append(
            f"{len(unjudged)} of {len(names)} classes have no held-out images, so the table does "
            f"not cover them: {_listed(unjudged.tolist(), names)}"
        )
    return said


def plain(name: str) -> str:
    """Normalize the spelling of a name: macOS writes é in file names as two code points, others as one."""
    return unicodedata.normalize("NFC", name).strip()


def _listed(labels: Iterable[int], names: Sequence[str]) -> str:
    numbers = list(labels)
    listed = [
        f"{label} ('{shown(names[label], 40)}')" if names[label] != str(label) else str(label)
        for label in numbers[:_LISTED]
    ]
    return ", ".join(listed) + (", …" if len(numbers) > _LISTED else "")


def _quoted(names: Sequence[str]) -> str:
    listed = ", ".join(f"'{shown(name, 40)}'" for name in names[:_LISTED])
    return listed + (", …" if len(names) > _LISTED else "")


def _refuse_beyond(labels: list[int], train: ClassInfo) -> None:
    beyond = [label for label in labels if label >= train.count]
    if beyond:
        raise UserError(
            f"{len(beyond)} held-out classes are not among the {train.count} training classes: "
            f"{', '.join(map(str, beyond[:_LISTED]))}{', …' if len(beyond) > _LISTED else ''}",
            where="data.test",
            remedy="remove them from the held-out images, or add training images for them",
        )


def _one_sided(train: ClassInfo, held: ClassInfo, labels: list[int]) -> UserError:
    sides = ("training", "held-out")
    has, lacks = sides if train.names and not held.names else sides[::-1]
    if train.names and held.names:
        what = (
            f"{len(labels)} held-out classes have a number but no name "
            f"({', '.join(map(str, labels[:_LISTED]))}), and the names of the others do not show "
            "that both sets number their classes the same way"
        )
    else:
        some = _quoted(list((train if train.names else held).names.values()))
        what = (
            f"the {has} images name their classes ({some}), but the {lacks} images only number "
            "theirs: nothing shows that the numbers mean the same"
        )
    remedy = (
        f"name the classes of the {lacks} images too (class_name in a shard's .json; in Parquet "
        "text labels, or ClassLabel's names)"
    )
    names = train.names or held.names
    if not any(name.isdigit() and name != str(number) for number, name in names.items()):
        # Names that are other numbers ('10' sorts before '2') must not be dropped for numbers.
        remedy += ", or, if both number their classes the same way, set data.match_classes=number"
    return UserError(what, where="data.match_classes", remedy=f"{remedy}")


def _unknown(names: list[str], train: ClassInfo) -> UserError:
    known = list(dict.fromkeys(train.names.values()))
    alike = [found[0] for name in names if (found := _like(name, known))]
    hint = f" (did you mean {_quoted(alike)}?)" if alike else ""
    return UserError(
        f"{len(names)} held-out classes are not among the training classes: {_quoted(names)}; "
        f"the training classes are {_quoted(known)}",
        where="data.test",
        remedy=f"use the same class names in both sets{hint}; remove classes without training "
        "images from the held-out images",
    )


def _like(name: str, known: list[str]) -> list[str]:
    lower = {each.lower(): each for each in known[:5000]}
    return [lower[each] for each in difflib.get_close_matches(name.lower(), list(lower), 1, 0.8)]


def _torn(names: list[str]) -> UserError:
    return UserError(
        f"several classes share a name, which makes them ambiguous: {_quoted(names)}; and the "
        "other names do not show that both sets number their classes the same way",
        where="data.match_classes",
        remedy="give each class a unique name, or, if both sets number their classes the same "
        "way, set data.match_classes=number",
    )
