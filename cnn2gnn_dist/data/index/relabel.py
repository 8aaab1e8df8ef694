"""The relabel list: which training images get another class, and which are left out (``data.relabel``).

A CSV file with the columns ``key`` and ``class``; further columns are ignored. Class ``drop`` (or ``-``)
leaves the image out; with ``drop?`` it may be missing. ``cnn2gnn audit --fix`` writes such a list; so does
``cnn2gnn memory forget``, whose images need not be among those of a later training.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import os
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.errors import UserError

DROP = ("drop", "-")
DROP_IF_THERE = "drop?"
"""Leave this image out if it is among the training images."""
NAMED = 3
"""Most keys or classes named in an error."""
_CLASS_REMEDY = "name one of the classes, or drop to leave the image out"


@dataclass(frozen=True)
class Decision:
    """What happens to an image.

    Attributes:
        name: its new class; None: it is left out.
        line: of the file.
        required: whether it is an error if there is no such image.
        word: the class as the file has it.
    """

    name: str | None
    line: int
    required: bool = True
    word: str = dataclasses.field(default="", compare=False)

    @property
    def text(self) -> str:
        """The class as a list is to have it."""
        return self.name or self.word or (DROP[0] if self.required else DROP_IF_THERE)


def read_relabel(path: Path) -> dict[str, Decision]:
    """Read a relabel list: key → decision. Lines without a class are not decisions, and are skipped.

    Raises:
        UserError: the file can't be read, lacks a column, or has two different decisions on a key.
    """
    found: dict[str, Decision] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            missing = {"key", "class"} - set(lines.fieldnames or ())
            if missing:
                raise UserError(
                    f"this relabel list has no column {' and no column '.join(sorted(missing))}",
                    where=str(path),
                    remedy="make the first line: key,class",
                )
            for line in lines:
                key, name = line["key"], (line["class"] or "").strip()
                if not key or not name:
                    continue
                out = name.lower() in (*DROP, DROP_IF_THERE)
                decision = Decision(
                    None if out else name, lines.line_num, name.lower() != DROP_IF_THERE, name
                )
                if key in found and found[key].name != decision.name:
                    raise UserError(
                        f"two decisions on {key!r}, in lines {found[key].line} and {decision.line}",
                        where=str(path),
                        remedy="keep one of the two lines",
                    )
                found[key] = decision
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"this relabel list can't be read: {why}",
            where=str(path),
            remedy="name a CSV file with the columns key and class, in UTF-8",
        ) from None
    return found


def write_relabel(path: Path, decisions: Mapping[str, Decision]) -> None:
    """Write a relabel list, replacing it atomically."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["key", "class"])
    lines.writerows([key, one.text] for key, one in decisions.items())
    durable.write_text(path, text.getvalue())


def unique_keys(manifest: Manifest, beside: Iterable[str] = ()) -> list[str]:
    """The keys of all images; where two shards use the same key, ``shard/key`` for every image.

    Shards of one name are told apart by their folders (``FOLDER/shard/key``). ``beside``: keys that other images of
    these shards have.
    """
    keys: list[str] = manifest.keys.to_pylist()
    if len(set(keys)) == len(keys) and not set(keys).intersection(beside):
        return keys
    return _full_names(manifest, keys)


def names_of(manifest: Manifest, beside: Iterable[str] = ()) -> dict[str, int]:
    """The row of each name of an image: its key, if no other image has it, and ``shard/key``.

    ``shard`` and ``beside`` as in ``unique_keys``. Where one image's key is the other name of another (``a/b``), it
    means the image to which ``unique_keys`` gives it.
    """
    keys: list[str] = manifest.keys.to_pylist()
    several = shared_keys(manifest).union(set(keys).intersection(beside))
    own = {key: row for row, key in enumerate(keys) if key not in several}
    found = {name: row for row, name in enumerate(_full_names(manifest, keys))}
    return own | found if several else found | own


def rows_named(
    manifest: Manifest, names: Iterable[str], beside: Collection[str] = ()
) -> np.ndarray:
    """Bool [N]: images with one of these names (``names_of``).

    A key that several images have names all of them here: which one was meant is not known. ``beside``: keys that
    other images of these shards have, and which name none of this manifest's.
    """
    wanted = set(names)
    if not wanted:
        return np.zeros(len(manifest), bool)
    rows = names_of(manifest, beside)
    several = wanted.difference(rows, beside)
    named_N = np.array([key in several for key in manifest.keys.to_pylist()], bool)
    named_N[[rows[name] for name in wanted.intersection(rows)]] = True
    return named_N


def keys_named(images: Iterable[tuple[str, str]], names: Iterable[str]) -> set[str]:
    """The keys of images that one of these names may mean, without a manifest: as ``rows_named``.

    A name that is a key means that image. Otherwise name and key may differ by what comes before the image's own key:
    the name of its shard, with or without its folder. One is then the other's end.

    Args:
        images: key, with or without its shard's name, and the shard's file name; empty: any shard.
        names: keys, or ``shard/key``.
    """
    listed = list(images)
    found = {key for key, _ in listed}.intersection(names)
    others = set(names).difference(found)
    ends = others.union(*map(_ends, others))
    for key, file in listed if others else ():
        shard, parts = os.path.splitext(file)[0], key.split("/")
        # Number of parts before the image's own key: in a key that may have slashes itself, up to the shard's name.
        places = (place for place, part in enumerate(parts[:-1], 1) if part == shard)
        before = max(places, default=0) if shard else len(parts) - 1
        longer = {f"{shard}/{key}"} | ({key} if before or not shard else set())
        if not others.isdisjoint(_ends(key)[:before]) or not ends.isdisjoint(longer):
            found.add(key)
    return found


def _ends(name: str) -> list[str]:
    """What follows each slash of a name, the longest first."""
    parts = name.split("/")
    return ["/".join(parts[place:]) for place in range(1, len(parts))]


def _full_names(manifest: Manifest, keys: Sequence[str]) -> list[str]:
    shards = shard_names([shard.path for shard in manifest.shards])
    return [f"{shards[s]}/{key}" for s, key in zip(manifest.shard_N.tolist(), keys, strict=True)]


def shared_keys(manifest: Manifest) -> set[str]:
    """The keys that several images have, which therefore name none of them."""
    return {key for key, count in Counter(manifest.keys.to_pylist()).items() if count > 1}


def shard_names(paths: Sequence[str]) -> list[str]:
    """The shards' names: file names without their suffix, with as many folders before them as tell them apart."""
    parts = [os.path.splitext(path)[0].split("/") for path in paths]
    found = [one[-1] for one in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        times = Counter(found)
        if len(times) == len(found):
            break
        found = [
            name if times[name] == 1 else "/".join(one[-depth:])
            for name, one in zip(found, parts, strict=True)
        ]
    return found


def check_decisions(
    decisions: Mapping[str, Decision],
    known: Mapping[str, int],
    classes: Sequence[str],
    where: str,
    elsewhere: Container[str] = (),
) -> None:
    """Check that all keys and classes exist, and that no image has two decisions under two names.

    Args:
        decisions: of the list.
        known: the row of each name of a training image.
        classes: names of the classes.
        where: the file, for errors.
        elsewhere: names of held-out images, for a more specific error.

    Raises:
        UserError: some don't, or one has.
    """
    unknown = [key for key, one in decisions.items() if one.required and key not in known]
    if unknown:
        held = [key for key in unknown if key in elsewhere]
        raise UserError(
            f"{_named(held)}: held out, but the list is for training images"
            if held
            else f"{_named(unknown)}: no training image has this key",
            where=f"{where}, line {decisions[(held or unknown)[0]].line}",
            remedy="remove these lines, or name the list that was made for these images",
        )
    lower = {name.lower(): name for name in classes}
    for one in decisions.values():
        if one.name is None and one.word.lower() in lower:
            raise UserError(
                f"{one.word!r} leaves an image out, but {lower[one.word.lower()]!r} is a class as well",
                where=f"{where}, line {one.line}",
                remedy=f"write '{next((w for w in DROP[::-1] if w not in lower), DROP_IF_THERE)}' to leave images out; "
                "rename the class to move images into it",
            )
    names = set(classes)
    wrong = {str(one.name): one for one in decisions.values() if one.name and one.name not in names}
    if wrong:
        name, first = next(iter(wrong.items()))
        near = difflib.get_close_matches(name, classes, n=1)
        raise UserError(
            f"{_named(list(wrong))}: not a class of the training images",
            where=f"{where}, line {first.line}",
            remedy=_CLASS_REMEDY + (f"; did you mean {near[0]!r}?" if near else ""),
        )
    _check_names(decisions, known, where)


def _check_names(decisions: Mapping[str, Decision], known: Mapping[str, int], where: str) -> None:
    first: dict[int, str] = {}
    for key in filter(known.__contains__, decisions):
        other = first.setdefault(known[key], key)
        if decisions[other].name != decisions[key].name:
            lines = f"lines {decisions[other].line} and {decisions[key].line}"
            raise UserError(
                f"{other!r} and {key!r} are one image, and there are two decisions on it, in {lines}",
                where=where,
                remedy="keep one of the two lines",
            )


def overridden(
    earlier: Mapping[str, Decision], later: Mapping[str, Decision], known: Mapping[str, int]
) -> dict[str, Decision]:
    """Both lists as one; on an image that both name, under whichever name, the later one decides."""
    decided = {known.get(key, key) for key in later}
    kept = {key: one for key, one in earlier.items() if known.get(key, key) not in decided}
    return kept | dict(later)


def relabelled(
    train: Manifest,
    held: Manifest,
    decisions: Mapping[str, Decision],
    where: str,
    *,
    allow_empty_classes: bool = False,
) -> tuple[Manifest, str]:
    """Apply a list to the training images; return their manifest and a sentence about the changes.

    Raises:
        UserError: unknown keys or classes; a key that several images have; two decisions on an image; a
            class, or the whole set, is left without an image.
    """
    row_of = names_of(train)
    # Before ``drop?`` lines may count as missing: the image that was meant would be trained on.
    shared = shared_keys(train)
    unclear = [key for key in decisions if key in shared and key not in row_of]
    if unclear:
        raise UserError(
            f"{_named(unclear)}: several training images have this key",
            where=f"{where}, line {decisions[unclear[0]].line}",
            remedy="name the image as SHARD/KEY, with the name of its shard without .tar",
        )
    check_decisions(decisions, row_of, train.classes, where, names_of(held))
    numbers = {name: number for number, name in enumerate(train.classes)}
    label_N = np.array(train.label_N)
    kept_N = np.ones(len(train), bool)
    missing = 0
    for key, one in decisions.items():
        if key not in row_of:  # not required
            missing += 1
            continue
        row = row_of[key]
        if one.name is None:
            kept_N[row] = False
        elif label_N[row] < 0 or train.classes[label_N[row]] != one.name:
            # If two classes share the name, an image that has one of them keeps it.
            if train.classes.count(one.name) > 1:
                raise UserError(
                    f"{one.name!r} is the name of two classes, and {key!r} is of neither",
                    where=f"{where}, line {one.line}",
                    remedy="give the two classes different names, or drop the image",
                )
            label_N[row] = numbers[one.name]
    changed = int((label_N != train.label_N)[kept_N].sum())
    what = "this relabel list leaves"
    made = _kept(train, label_N, kept_N, what, where, allow_empty_classes)
    dropped = int((~kept_N).sum())
    return (
        made,
        f"relabel list: {changed} training images get another class, {dropped} are left out"
        + (f", {missing} are missing" if missing else ""),
    )


def without(
    train: Manifest, names: Iterable[str], where: str, *, allow_empty_classes: bool = False
) -> tuple[Manifest, int]:
    """Leave out the training images with one of these names (``rows_named``); return how many that were, too.

    Raises:
        UserError: a class, or the whole set, is left without an image.
    """
    kept_N = ~rows_named(train, names)
    if kept_N.all():
        return train, 0
    what = "without the forgotten images there is"
    made = _kept(train, train.label_N, kept_N, what, where, allow_empty_classes)
    return made, len(train) - len(made)


def _kept(
    train: Manifest,
    label_N: np.ndarray,
    kept_N: np.ndarray,
    what: str,
    where: str,
    allow_empty_classes: bool,
) -> Manifest:
    made = dataclasses.replace(train, label_N=label_N).select(np.flatnonzero(kept_N))
    emptied = np.setdiff1d(train.label_N, made.label_N)
    if not len(made) or (len(emptied) and not allow_empty_classes):
        names = [train.classes[c] for c in emptied if c >= 0]
        raise UserError(
            f"{what} no training image of {_named(names)}",
            where=where,
            remedy="leave one of the class in, or data.allow_empty_classes=true",
        )
    return made


def _named(names: Sequence[str]) -> str:
    some = ", ".join(repr(name) for name in names[:NAMED])
    return some + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
