"""Class names as shards tell them: ``class_name`` in samples' ``.json``, lists beside the shards.

Every sample's name is compared with what was told of its class before, mostly by looking for the
same few bytes: parsing each json would double the time of an index.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cnn2gnn_dist.data.tar.samples import TarSample
from cnn2gnn_dist.data.tar.tar_file import Archive, shown
from cnn2gnn_dist.errors import UserError

MAX_JSON = 1 << 20
SMALL = 4096
"""Bytes of a json that lie in a window that was read anyway; of longer ones one a class is read."""
_MAX_NAME = 1000
_FIELD = b'"class_name"'
_SHARD = re.compile(r"(.+)-\d+\.tar")
_LIST = "-classes.json"


class Named(NamedTuple):
    """The name of a class, how it looks in a json, and who says so."""

    name: str
    bytes: bytes
    where: str


class Names:
    """Collects what one shard says.

    Args:
        archive: the shard.
        known: names by class from elsewhere.

    Attributes:
        found: names that were not known before.
        bytes: what lies in a json that gives a class the name it is known by.
    """

    def __init__(self, archive: Archive, known: Mapping[int, Named]) -> None:
        self.found: dict[int, Named] = {}
        self._read, self._where, self._known = archive.read, archive.where, known
        self.bytes = {label: named.bytes for label, named in list(known.items())}

    def see(self, label: int, sample: TarSample) -> None:
        """Take in the name that a sample with a ``.json`` gives its class.

        Raises:
            UserError: it is another one than before.
        """
        member = sample.fields["json"]
        if member.size > SMALL and (member.size > MAX_JSON or label in self.bytes):
            return
        about = self._read(member.offset, member.size)
        if _FIELD in about and self.bytes.get(label, _FIELD + b"?") not in about:
            self._take(label, about, sample)

    def _take(self, label: int, about: bytes, sample: TarSample) -> None:
        name = _name_in(about)
        if name is None:
            if b'"class_name": null' in about:  # as our own packers write; seen at once next time
                self.bytes.setdefault(label, b'"class_name": null')
            return
        member = f"{self._where}, member '{shown(sample.fields['json'].name)}'"
        new = Named(name, _as_written(name, about), member)
        old = self.found.get(label) or self._known.get(label)
        if old is None:
            self.found[label] = new
        elif old.name != name:
            raise disagree(label, old, new)
        self.bytes[label] = new.bytes


def merge(known: dict[int, Named], found: Mapping[int, Named]) -> None:
    """Add what a shard says to what is known.

    Raises:
        UserError: they give one class two names.
    """  # noqa: DOC501
    for label, named in found.items():
        old = known.setdefault(label, named)
        if old.name != named.name:
            raise disagree(label, old, named)


def disagree(label: int, old: Named, new: Named) -> UserError:
    """The error for two names of one class."""
    return UserError(
        f"Class {label} is '{shown(new.name, 60)}' here, and '{shown(old.name, 60)}' in "
        f"{old.where}: one of them numbers the classes in another way.",
        where=new.where,
        remedy="Write the shards anew with one numbering; shards of two data sets can't be mixed.",
    )


def lists_beside(paths: Iterable[str]) -> tuple[dict[int, Named], int]:
    """The names in ``PREFIX-classes.json`` beside local shards, and how many classes they list.

    Raises:
        UserError: such a list is damaged, or two of them disagree.
    """
    known: dict[int, Named] = {}
    count = 0
    for path in lists_of(paths):
        names = _read_list(path)
        count = max(count, len(names))
        merge(known, {n: Named(x, _bytes_of(x), path) for n, x in enumerate(names) if x})
    return known, count


def lists_of(paths: Iterable[str]) -> list[str]:
    """The files ``PREFIX-classes.json`` that lie beside local shards ``PREFIX-NUMBER.tar``."""
    prefixes = dict.fromkeys(m.group(1) for m in map(_SHARD.fullmatch, paths) if m)
    lists = [f"{prefix}{_LIST}" for prefix in prefixes if "://" not in prefix]
    return [path for path in lists if os.path.isfile(path)]


def unused_lists(paths: Sequence[str]) -> str | None:
    """What to say of lists in the folders of local shards that name none of their classes.

    A list of other shards that lie there too (the held-out ones, say) is nothing to speak of.
    """
    here = [path for path in paths if "://" not in path]
    used = set(lists_of(here))
    unused = []
    for folder in dict.fromkeys(map(os.path.dirname, here)):
        names = os.listdir(folder or ".")
        owners = {m.group(1) for m in map(_SHARD.fullmatch, names) if m}
        for name in sorted(name for name in names if name.endswith(_LIST)):
            path = os.path.join(folder, name)
            read = _read_list(path) if path in used else name[: -len(_LIST)] in owners
            if not read and os.path.isfile(path):
                unused.append(path)
    if not unused:
        return None
    return (
        f"{shown(unused[0], 200)} is not read{_more(len(unused) - 1)}: a list of class names is "
        "one JSON list beside its shards, PREFIX-classes.json beside PREFIX-000000.tar"
    )


def _more(count: int) -> str:
    return f" (nor {'is' if count == 1 else 'are'} {count} more)" if count else ""


def _read_list(path: str) -> list[str | None]:
    try:
        with open(path, encoding="utf-8") as file:
            names = json.load(file)
    except (OSError, ValueError, RecursionError) as failure:
        raise UserError(
            f"The list of the classes beside the shards can't be read: {failure}.",
            where=path,
            remedy="Pack the shards again, or delete the list: names are then those in the shards.",
        ) from failure
    if not isinstance(names, list) or any(not isinstance(x, str | None) for x in names):
        return []  # somebody else's file
    refuse_blank(names, path)
    return names


def refuse_blank(names: Sequence[str | None], where: str) -> None:
    """Refuse several classes one of which is called by nothing: rows without a label.

    Raises:
        UserError: one is.
    """
    blank = [n for n, name in enumerate(names) if name is not None and not name.strip()]
    if blank and len(names) > 1:
        raise UserError(
            f"The name of class {blank[0]} is empty, and the other {len(names) - 1} have some.",
            where=where,
            remedy="Give the samples without a label one, or leave them out of the data.",
        )


def _name_in(about: bytes) -> str | None:
    """``class_name`` of a ``.json``; a json of another make is no fault."""
    try:
        name = json.loads(about)["class_name"]
        name.encode("utf-8")  # JSON may hold halves of surrogate pairs
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and 0 < len(name) <= _MAX_NAME else None


def _as_written(name: str, about: bytes) -> bytes:
    """The bytes of field and name in this json, or some that are in none."""
    for plain in (False, True):
        for colon in (": ", ":"):
            written = f'"class_name"{colon}{json.dumps(name, ensure_ascii=plain)}'.encode()
            if written in about:
                return written
    return _bytes_of(name)


def _bytes_of(name: str) -> bytes:
    return f'"class_name": {json.dumps(name, ensure_ascii=False)}'.encode()
