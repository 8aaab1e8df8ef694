"""Class names from shards: ``class_name`` in the samples' ``.json``, and lists next to the shards.

The name in each sample is compared with the known name of its class, mostly by searching for the
same few bytes: parsing every JSON file would double the time to build an index.
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
"""JSON files up to this many bytes are in a window that is read anyway; of longer ones, one per class is read."""
_MAX_NAME = 1000
_FIELD = b'"class_name"'
_SHARD = re.compile(r"(.+)-\d+\.tar")
_LIST = "-classes.json"


class NamedClass(NamedTuple):
    """The name of a class, its bytes in a JSON file, and where it was found."""

    name: str
    bytes: bytes
    where: str


class ShardClassNames:
    """Collects the class names of one shard.

    Args:
        archive: the shard.
        known: class → name, from other sources.

    Attributes:
        found: names that were not known before.
        bytes: class → the bytes that a JSON file with the known name contains.
    """

    def __init__(self, archive: Archive, known: Mapping[int, NamedClass]) -> None:
        self.found: dict[int, NamedClass] = {}
        self._read, self._where, self._known = archive.read, archive.where, known
        self.bytes = {label: named.bytes for label, named in list(known.items())}

    def see(self, label: int, sample: TarSample) -> None:
        """Record the class name given by a sample with a ``.json``.

        Raises:
            UserError: it differs from the known name.
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
            if (
                b'"class_name": null' in about
            ):  # as our packers write it; take the fast path next time
                self.bytes.setdefault(label, b'"class_name": null')
            return
        member = f"{self._where}, member '{shown(sample.fields['json'].name)}'"
        new = NamedClass(name, _as_written(name, about), member)
        old = self.found.get(label) or self._known.get(label)
        if old is None:
            self.found[label] = new
        elif old.name != name:
            raise disagree(label, old, new)
        self.bytes[label] = new.bytes


def merge(known: dict[int, NamedClass], found: Mapping[int, NamedClass]) -> None:
    """Merge the names of a shard into the known names.

    Raises:
        UserError: one class has two names.
    """  # noqa: DOC501
    for label, named in found.items():
        old = known.setdefault(label, named)
        if old.name != named.name:
            raise disagree(label, old, named)


def disagree(label: int, old: NamedClass, new: NamedClass) -> UserError:
    """Return the error for two names of one class."""
    return UserError(
        f"class {label} is '{shown(new.name, 60)}' here but '{shown(old.name, 60)}' in "
        f"{old.where}: the two number their classes differently",
        where=new.where,
        remedy="rewrite the shards with one numbering; shards of two data sets can't be mixed",
    )


def lists_beside(paths: Iterable[str]) -> tuple[dict[int, NamedClass], int]:
    """Return the names in ``PREFIX-classes.json`` next to local shards, and the number of classes listed.

    Raises:
        UserError: a list is corrupt, or two lists disagree.
    """
    known: dict[int, NamedClass] = {}
    count = 0
    for path in lists_of(paths):
        names = _read_list(path)
        count = max(count, len(names))
        merge(known, {n: NamedClass(x, _bytes_of(x), path) for n, x in enumerate(names) if x})
    return known, count


def lists_of(paths: Iterable[str]) -> list[str]:
    """Return the files ``PREFIX-classes.json`` next to local shards ``PREFIX-NUMBER.tar``."""
    prefixes = dict.fromkeys(m.group(1) for m in map(_SHARD.fullmatch, paths) if m)
    lists = [f"{prefix}{_LIST}" for prefix in prefixes if "://" not in prefix]
    return [path for path in lists if os.path.isfile(path)]


def unused_lists(paths: Sequence[str]) -> str | None:
    """Return a sentence on lists in the folders of local shards that name none of their classes, or None.

    A list that belongs to other shards in the same folder (for example the held-out ones) does not count.
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
        f"{shown(unused[0], 200)} is not read{_more(len(unused) - 1)}: class names belong in one "
        "JSON list next to the shards, PREFIX-classes.json next to PREFIX-000000.tar"
    )


def _more(count: int) -> str:
    if not count:
        return ""
    return " (nor is 1 other)" if count == 1 else f" (nor are {count} others)"


def _read_list(path: str) -> list[str | None]:
    try:
        with open(path, encoding="utf-8") as file:
            names = json.load(file)
    except (OSError, ValueError, RecursionError) as failure:
        raise UserError(
            f"the class list next to the shards can't be read: {failure}",
            where=path,
            remedy="pack the shards again, or delete the list to use the names in the shards",
        ) from failure
    if not isinstance(names, list) or any(not isinstance(x, str | None) for x in names):
        return []  # an unrelated file
    refuse_blank(names, path)
    return names


def refuse_blank(names: Sequence[str | None], where: str) -> None:
    """Refuse a blank name among several classes: it comes from rows without a label.

    Raises:
        UserError: a name is blank.
    """
    blank = [n for n, name in enumerate(names) if name is not None and not name.strip()]
    if blank and len(names) > 1:
        raise UserError(
            f"class {blank[0]} has an empty name, unlike the other {len(names) - 1}",
            where=where,
            remedy="label the samples that have no label, or remove them from the data",
        )


def _name_in(about: bytes) -> str | None:
    """Return ``class_name`` of a ``.json``, or None; JSON of any other form is not an error."""
    try:
        name = json.loads(about)["class_name"]
        name.encode("utf-8")  # JSON may contain lone surrogates
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and 0 < len(name) <= _MAX_NAME else None


def _as_written(name: str, about: bytes) -> bytes:
    """Return the bytes of field and name as written in this JSON, or in the default form if not found."""
    for plain in (False, True):
        for colon in (": ", ":"):
            written = f'"class_name"{colon}{json.dumps(name, ensure_ascii=plain)}'.encode()
            if written in about:
                return written
    return _bytes_of(name)


def _bytes_of(name: str) -> bytes:
    return f'"class_name": {json.dumps(name, ensure_ascii=False)}'.encode()
