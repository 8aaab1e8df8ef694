"""Tar shards as samples: the byte range of each member, and the sample it belongs to.

Samples match what webdataset makes of the same archive, name for name and byte for byte: the key is
the path up to the first dot of the basename; the rest, lower-cased, names the field. Where webdataset
would lose or mix data, the shard is refused by name: two members for one field, and a key that
reappears after another one.

Whatever the members are called and contain, nothing is written, no name is used as a path, and no
payload is read or unpickled here; links, directories and devices are ignored (see :mod:`.full_header`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from cnn2gnn_dist.data.tar.full_header import Member
from cnn2gnn_dist.data.tar.members import members, walk
from cnn2gnn_dist.data.tar.tar_file import Archive, shown
from cnn2gnn_dist.errors import UserError

__all__ = ["MACOS", "Member", "TarSample", "grouped", "hidden", "samples", "split_name", "walk"]

# Both are copied from webdataset.tariterators, so that names parse the same way.
_META = re.compile(r"__[^/]*__($|/)")
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_TAKEN = {"__key__", "__url__"}  # webdataset adds these to every sample

MACOS = (
    "write the shard again without hidden files; on macOS: COPYFILE_DISABLE=1 tar "
    "--no-mac-metadata --exclude .DS_Store -cf SHARD.tar …"
)


class TarSample(NamedTuple):
    """The members that share a key; ``fields`` maps lower-cased suffixes to them, in tar order."""

    key: str
    fields: dict[str, Member]


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and lower-cased suffix; None if it belongs to no sample.

    The rule is webdataset's, even where it surprises: a hidden file at the top level is skipped, one
    inside a folder (``train/._a.jpg``, as macOS writes them) is field ``_a.jpg`` of a sample
    ``train/``. :func:`hidden` detects such keys.
    """
    if name[:2] == "__" and _META.match(name):
        return None
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot > base and "\n" not in name:  # same result as the regex below, four times as fast
        return name[:dot], name[dot + 1 :].lower()
    match = _KEY.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def hidden(key: str) -> bool:
    """Return whether a sample consists of the hidden files of a folder rather than of images."""
    return key.endswith("/")


def samples(path: str | os.PathLike[str], where: str | None = None) -> Iterator[TarSample]:
    """Group the members of a shard into samples, in tar order, as webdataset does.

    Args:
        path: the shard.
        where: its name in errors (for example a URL); default: the path.

    Raises:
        UserError: as :func:`walk`; two members for one field of a sample; a key that reappears
            after another one (webdataset would make two samples of it).
    """
    with Archive(path, where) as archive:
        yield from grouped(archive)


def grouped(archive: Archive) -> Iterator[TarSample]:
    """Group the members of an open archive into samples, as :func:`samples` does.

    Raises:
        UserError: as :func:`samples`.
    """  # noqa: DOC501
    key, fields, new = "", dict[str, Member](), tuple.__new__
    seen: set[str] = set()
    for member in members(archive):
        name = member[0]
        base = name.rfind("/") + 1
        dot = name.find(".", base)
        if dot > base and name[0] != "_" and "\n" not in name:
            prefix, suffix = name[:dot], name[dot + 1 :].lower()
        else:
            split = split_name(name)
            if split is None:
                archive.skipped.add(_why_none(name), name)
                continue
            prefix, suffix = split
        if prefix != key or not fields:
            if fields and not _marked_bad(archive, fields):
                yield new(TarSample, (key, fields))
            if prefix in seen:
                raise _scattered(archive.where, member)
            seen.add(prefix)
            key, fields = prefix, {}
        if suffix in fields or suffix in _TAKEN:
            raise UserError(
                f"sample '{shown(key)}' has a duplicate field '.{shown(suffix)}'"
                f"{' (webdataset reserves that name)' if suffix in _TAKEN else ''}",
                where=f"{archive.where}, member '{shown(member.name)}'",
                remedy=MACOS
                if hidden(key)
                else "give each member of a sample its own suffix (case does not count)",
            )
        fields[suffix] = member
    if fields and not _marked_bad(archive, fields):
        yield new(TarSample, (key, fields))


def _why_none(name: str) -> str:
    """Return why a member belongs to no sample."""
    if _META.match(name):
        return "named __…__, which webdataset does not read as samples"
    return "hidden" if os.path.basename(name).startswith(".") else "without a suffix"


def _marked_bad(archive: Archive, fields: dict[str, Member]) -> bool:
    """Return whether webdataset drops the sample: it has a non-empty member ``KEY.__bad__``."""
    if "__bad__" not in fields or not fields["__bad__"].size:
        return False
    archive.skipped.add("of samples marked __bad__", fields["__bad__"].name, len(fields))
    return True


def _scattered(shard: str, member: Member) -> UserError:
    key = (split_name(member.name) or ("",))[0]
    if hidden(key):
        return UserError(
            "the shard contains hidden files, which webdataset reads as fields of a sample "
            f"'{shown(key)}', and they are not contiguous",
            where=f"{shard}, member '{shown(member.name)}'",
            remedy=MACOS,
        )
    return UserError(
        f"the members of sample '{shown(key)}' are not contiguous",
        where=f"{shard}, member '{shown(member.name)}'",
        remedy="write the shard with the members of each sample next to each other (tar "
        "--sort=name does this), and each key only once",
    )
