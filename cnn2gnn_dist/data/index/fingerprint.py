"""Fingerprints of a run's input files: which files they are, and whether their contents are unchanged.

Names, lengths and times are checked every time. Contents are read once, and again only for files
whose length or time differs from the record. So a touched file, or a copy that did not keep its time,
is the same file, and a file changed at equal length is not. For a remote file, the store is asked for
a tag (ETag, Last-Modified). Names are relative to the common folder of all files, so data may move.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.images.image_files import find_images
from cnn2gnn_dist.data.index import class_names
from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.data.storage.shard_paths import files_of
from cnn2gnn_dist.errors import UserError

READ_BYTES = 16 << 30
"""Contents of larger data sets are not read unless requested; their times are compared instead."""
LISTED = 200_000
"""With more files, only hashes over all files are recorded, and not which file differs."""
AT_ONCE, LOT = 8, 256
"""Number of threads, and files per task."""
SHORT = 1 << 20
"""Files up to this many bytes are read by one `os.read`: Python's `open` costs more than a small image."""


class FileStat(NamedTuple):
    """A file without its content: ``time`` in ns; ``tag`` of a remote file, "" if it has none."""

    name: str
    place: str
    bytes: int
    time: int = 0
    tag: str = ""


@dataclass(frozen=True)
class Fingerprint:
    """The recorded fingerprint of the files of one origin.

    Attributes:
        origin: the paths as written in the config.
        by: "bytes": contents were read; "times": the set is too large, so times are compared.
        look: hash of names, lengths, times and tags, in file order.
        content: hash of names, lengths and contents; part of a stage's key.
        files: name → (bytes, time, content or tag); None beyond `LISTED` files. Files that share a name (of two
            buckets) are listed by their URL.
    """

    origin: tuple[str, ...]
    by: str
    look: str
    content: str
    files: dict[str, tuple[int, int, str]] | None

    def tree(self) -> dict[str, Any]:
        """Return the fingerprint as plain data."""
        return dict(self.__dict__)

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Fingerprint:
        """Parse plain data; raises KeyError, TypeError or ValueError if it is not a fingerprint."""
        files = tree["files"]
        if files is not None:
            files = {str(n): (int(b), int(t), str(m)) for n, (b, t, m) in files.items()}
        by, looked, content = (str(tree[name]) for name in ("by", "look", "content"))
        return cls(tuple(tree["origin"]), by, looked, content, files)


def paths_of(origin: str | Sequence[str]) -> tuple[str, ...]:
    """Return the paths of an origin as a tuple."""
    return (origin,) if isinstance(origin, str) else tuple(origin)


def folder_of(origin: str | Sequence[str]) -> str:
    """Return the folder of an origin of the source "imagefolder"."""
    return os.path.expanduser(paths_of(origin)[0].removeprefix("file://"))


def list_files(
    origin: str | Sequence[str], source: str, *, ask: bool, brief: bool
) -> list[FileStat]:
    """Return the files of an origin in the order in which they are read.

    Args:
        origin: ``data.train`` or ``data.test``.
        source: "imagefolder" (includes every image, also in subfolders), "parquet" or "shards"
            (includes the lists of class names next to the shards, after all shards).
        ask: ask remote stores for length and tag.
        brief: use a short timeout for remote stores.

    Raises:
        UserError: files are missing; a remote store can't be reached.
    """
    if source == "imagefolder":
        return _images(folder_of(origin))
    places = files_of(source, paths_of(origin))
    far = [place for place in places if urls.is_remote(place)]
    near = [os.path.abspath(place) for place in places if not urls.is_remote(place)]
    base = os.path.commonpath([os.path.dirname(p) for p in near]) if near else ""
    if source == "shards":
        places = [*places, *class_names.lists_of(near)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        about = dict(
            zip(far, pool.map(lambda u: urls.file_info(u, brief=brief), far), strict=True)
            if ask
            else []
        )
    names = dict(zip(far, _remote_names(far), strict=True))
    found = []
    for place in places:
        if place in names:
            size, tag = (about[place].bytes, about[place].tag) if ask else (-1, "")
            found.append(FileStat(names[place], place, size, 0, tag))
        else:
            path = os.path.abspath(place)
            about_it = _regular(path)
            name = os.path.relpath(path, base)
            found.append(FileStat(name, path, about_it.st_size, about_it.st_mtime_ns))
    return found


def _regular(path: str) -> os.stat_result:
    """Stat a file without opening it: opening a pipe would block.

    Raises:
        UserError: it is missing or not a regular file.
    """
    remedy = "name the files with a glob that excludes this one, or move it elsewhere"
    try:
        found = os.stat(path)
    except OSError as failure:
        link = f"is a link to {os.readlink(path)}, which " if os.path.islink(path) else ""
        raise UserError(
            f"the file {link}can't be accessed: {failure.strerror}", where=path, remedy=remedy
        ) from failure
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise UserError(f"this is {kind}, not a regular file", where=path, remedy=remedy)
    return found


def fingerprint(
    origin: str | Sequence[str],
    seen: Sequence[FileStat],
    before: Fingerprint | None,
    *,
    read_all: bool = False,
    recheck: bool = False,
) -> Fingerprint:
    """Compute the fingerprint of files, reusing the previous one.

    Args:
        origin: the paths as written in the config.
        seen: the files as they are now.
        before: the last fingerprint of this origin.
        read_all: read contents however large the set is.
        recheck: read contents even if lengths and times are unchanged.
    """
    sums = _sum(f"{s.name}\0{s.bytes}\0{s.time}\0{s.tag}" for s in seen)
    if before is not None and before.look == sums and not recheck:
        return Fingerprint(paths_of(origin), before.by, sums, before.content, before.files)
    small = sum(max(s.bytes, 0) for s in seen if not urls.is_remote(s.place)) <= READ_BYTES
    by = before.by if before else ("bytes" if read_all or small else "times")
    known = (before.files or {}) if before and not recheck else {}

    names = _distinct_names(seen)
    unread = [_unread(s, by, known.get(name)) for s, name in zip(seen, names, strict=True)]
    read = iter(
        _in_lots(_contents, [s for s, mark in zip(seen, unread, strict=True) if mark is None])
    )
    marks = [str(next(read) if mark is None else mark) for mark in unread]
    pairs = list(zip(seen, marks, strict=True))
    content = _sum(f"{s.name}\0{s.bytes}\0{mark}" for s, mark in pairs)
    files = {name: (s.bytes, s.time, mark) for name, (s, mark) in zip(names, pairs, strict=True)}
    return Fingerprint(paths_of(origin), by, sums, content, files if len(files) <= LISTED else None)


def _distinct_names(seen: Sequence[FileStat]) -> list[str]:
    """The files' names; of remote ones that share theirs with another file, the URLs without queries."""
    times = Counter(s.name for s in seen)
    return [
        s.name if times[s.name] == 1 or not urls.is_remote(s.place) else s.place.partition("?")[0]
        for s in seen
    ]


def difference(old: Fingerprint, new: Fingerprint) -> str:
    """Describe which files differ; empty if the contents are the same."""
    if old.content == new.content:
        return ""
    if old.files is None or new.files is None:
        return "the files are different"
    same = "times" if old.by == "times" else "contents"
    added = [n for n in new.files if n not in old.files]
    gone = [n for n in old.files if n not in new.files]
    changed = [
        n
        for n in new.files
        if n in old.files
        and (old.files[n][0], old.files[n][2]) != (new.files[n][0], new.files[n][2])
    ]
    words = [
        f"{len(names)} {what} ({names[0]}{', …' * (len(names) > 1)})"
        for names, what in (
            (changed, f"with different {same}"),
            (added, "added"),
            (gone, "removed"),
        )
        if names
    ]
    return ", ".join(words) or "in a different order"


def _images(folder: str) -> list[FileStat]:
    """Return the images of a folder and its subfolders; files that are never packed are not included."""
    if not os.path.isdir(folder):
        return []

    def look(names: list[str]) -> list[FileStat]:
        found = []
        for name in names:
            path = os.path.join(folder, name)
            try:
                there = os.stat(path)
            except OSError:  # deleted since it was listed
                found.append(FileStat(name, path, -1))
            else:
                found.append(FileStat(name, path, there.st_size, there.st_mtime_ns))
        return found

    return _in_lots(look, find_images(folder, classes=True).images)


def _in_lots(work: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
    """Map ``work`` over the items in lots, in order; threads overlap network latency."""
    lots = [items[start : start + LOT] for start in range(0, len(items), LOT)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [result for lot in pool.map(work, lots) for result in lot]


def _unread(file: FileStat, by: str, old: tuple[int, int, str] | None) -> str | None:
    """Return the content's stand-in if it need not be read (tag, time or the recorded hash), else None."""
    if urls.is_remote(file.place):
        return file.tag
    if by == "times":
        return str(file.time)
    return old[2] if old and old[:2] == (file.bytes, file.time) else None


def _remote_names(places: Sequence[str]) -> list[str]:
    """Return the URL paths relative to their common parent; queries, which hold signatures, are ignored."""
    paths = [urlsplit(place).path for place in places]
    base = posixpath.commonpath([posixpath.dirname(p) or "/" for p in paths]) if paths else ""
    return [posixpath.relpath(path or "/", base) for path in paths]


def _contents(files: list[FileStat]) -> list[str]:
    return [_content(file) for file in files]


def _content(file: FileStat) -> str:
    try:
        if file.bytes > SHORT:
            return durable.sha256(Path(file.place))[:20]
        handle = os.open(file.place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return hashlib.sha256(os.read(handle, SHORT)).hexdigest()[:20]
        finally:
            os.close(handle)
    except OSError:  # packing reports it
        return "unreadable"


def _sum(lines: Iterator[str]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(os.fsencode(line) + b"\n")
    return found.hexdigest()[:32]
