"""Search for image files below a folder: one rule for packing and prediction, and no file is skipped silently.

A file is an image if it has an image suffix (``a.jpg``), or no recognizable suffix (``a``,
``a.jpg?size=2``) and the first bytes of a supported format. Links are followed; each folder is read once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from cnn2gnn_dist.data.images.formats import HEAD, IMAGE_SUFFIXES, image_suffix, what_it_is
from cnn2gnn_dist.errors import UserError

HIDDEN, LOOSE, BROKEN = "hidden", "loose file beside the class folders", "broken link"
TWICE, SPECIAL, COPY = "link to a folder that was already read", "special file", "unfinished copy"
NAMELESS, CORRUPT = "without a suffix, not an image by its bytes", "corrupt"
_PLURAL = {
    LOOSE: "loose files beside the class folders",
    BROKEN: "broken links",
    TWICE: "links to folders that were already read",
    SPECIAL: "special files",
    COPY: "unfinished copies",
}
READ_AT_ONCE, PIECE = 8, 64
MAX_BYTES = 1_500_000_000
"""Most bytes of a file that is read as an image: more than the largest one takes as uncompressed float32."""
WRITER_S, BYTES_S = 10, 60
"""Seconds to wait on a pipe: for a writer, and for the writer's next bytes."""

_JUNK = {
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "Thumbs.db",
    "desktop.ini",
}
_COPIES = {"bak", "orig", "tmp", "temp", "part", "partial", "crdownload", "download"}
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,12}")


@dataclass
class FolderScan:
    """The contents of a folder.

    Attributes:
        images: paths of the images relative to the folder, sorted folder by folder.
        folders: names of the folders directly in it (without hidden ones), sorted.
        left_out: reason → paths, relative to the folder, of everything that is not an image.
    """

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, path: str) -> None:
        """Record a path that is left out."""
        self.left_out.setdefault(reason, []).append(path)

    def summary(self) -> str:
        """Return the counts by reason with the first example of each; empty if nothing is left out."""
        parts = []
        for reason, paths in sorted(self.left_out.items(), key=lambda it: (-len(it[1]), it[0])):
            name = reason if len(paths) == 1 else _PLURAL.get(reason, reason)
            more = "not read; " if reason.startswith(".") else ""
            parts.append(f"{len(paths)} {name} ({more}first: {printable(min(paths))})")
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """Return the counts with five examples each, as stored next to the shards."""
        left_out = {
            reason: {"count": len(paths), "first": [printable(path) for path in sorted(paths)[:5]]}
            for reason, paths in sorted(self.left_out.items())
        }
        return {"images": len(self.images), "left_out": left_out}


def corrupt_in(record: Path) -> tuple[int, list[str]]:
    """Return the number of corrupt images and the first of them from a saved :meth:`FolderScan.record`.

    Zero if the file is missing: only folder trees are searched for images.
    """
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["left_out"].get(CORRUPT)
    except FileNotFoundError:
        return 0, []
    return (found["count"], found["first"]) if found else (0, [])


def printable(path: str | os.PathLike[str]) -> str:
    r"""Return a path as text that is safe to print anywhere.

    Bytes that are not UTF-8 become ``\xe9``, and so do control characters: a name can hold a line end.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def find_images(root: str | os.PathLike[str], *, classes: bool = False) -> FolderScan:
    """Find all images below a folder.

    Args:
        root: the folder.
        classes: the folders in it are classes, so images directly in it are left out.

    Raises:
        UserError: a folder is not readable, so the result would be incomplete; with ``classes``, a
            broken link in the root may have been a class.
    """
    found = FolderScan()
    walk = _Walk(str(root), classes, found)
    walk.folders([""])
    while walk.linked:  # links last: a folder inside the tree is listed at its real place
        walk.linked.sort(reverse=True)
        walk.follow(walk.linked.pop())
    found.images.sort(key=lambda path: path.split(os.sep))
    found.folders.sort()
    for paths in found.left_out.values():
        paths.sort()
    return found


class _Walk:
    def __init__(self, root: str, classes: bool, found: FolderScan) -> None:
        self.root, self.classes, self.found = root, classes, found
        self.linked: list[str] = []
        above = [Path(root).resolve(), *Path(root).resolve().parents]
        self.seen = {
            _identity(os.stat(path)) for path in above[1:]
        }  # a link to one of them would walk root again

    def folders(self, names: Iterable[str]) -> None:
        """Walk folders recursively; links to folders are queued.

        Raises:
            UserError: a folder can't be read.
        """
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            try:
                with os.scandir(os.path.join(self.root, name)) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
                self.seen.add(_identity(os.stat(os.path.join(self.root, name))))
            except OSError as error:
                raise UserError(
                    f"a folder of images can't be read: {error.strerror}",
                    where=printable(os.path.join(self.root, name)),
                    remedy="make it readable, or remove it",
                ) from None
            for entry in entries:
                path = os.path.join(name, entry.name) if name else entry.name
                if self._is_folder(entry, path, at_top=not name):
                    waiting.append(path)

    def follow(self, name: str) -> None:
        """Walk the target of a folder link, unless it has already been walked."""
        if _identity(os.stat(os.path.join(self.root, name))) in self.seen:
            self.found.leave(TWICE, name)
        else:
            self.folders([name])

    def _is_folder(self, entry: os.DirEntry[str], path: str, *, at_top: bool) -> bool:
        """Classify one entry; return whether it is a folder to walk right away."""
        if entry.name.startswith(".") or entry.name in _JUNK:
            self.found.leave(HIDDEN, path)
            return False
        if entry.is_symlink():
            self._link(entry, path, at_top=at_top)
            return False
        if entry.is_dir(follow_symlinks=False):
            if (
                _identity(entry.stat(follow_symlinks=False)) in self.seen
            ):  # inside a link target, and already read
                self.found.leave(TWICE, path)
                return False
            if at_top:
                self.found.folders.append(entry.name)
            return True
        if entry.is_file(follow_symlinks=False):
            self._file(entry.name, path, at_top=at_top)
        else:
            self.found.leave(SPECIAL, path)
        return False

    def _link(self, entry: os.DirEntry[str], path: str, *, at_top: bool) -> None:
        try:
            kind = entry.stat().st_mode
        except OSError:
            if at_top and self.classes and _suffix(entry.name) not in IMAGE_SUFFIXES:
                raise UserError(
                    f"'{printable(entry.name)}' is a broken link; if it was a class, that class "
                    "would be missing",
                    where=printable(os.path.join(self.root, path)),
                    remedy="fix the link, or remove it",
                ) from None
            self.found.leave(BROKEN, path)
            return
        if stat.S_ISDIR(kind):
            if at_top:
                self.found.folders.append(entry.name)
            self.linked.append(path)
        elif stat.S_ISREG(kind):
            self._file(entry.name, path, at_top=at_top)
        else:
            self.found.leave(SPECIAL, path)

    def _file(self, name: str, path: str, *, at_top: bool) -> None:
        suffix = _suffix(name)
        if suffix in _COPIES or name.endswith("~"):
            self.found.leave(COPY, path)
        elif suffix in IMAGE_SUFFIXES or _is_image(os.path.join(self.root, path)):
            if at_top and self.classes:
                self.found.leave(LOOSE, path)
            else:
                self.found.images.append(path)
        elif suffix and _SUFFIX.fullmatch(suffix):
            self.found.leave(f".{suffix}", path)
        else:
            self.found.leave(NAMELESS, path)


def unreadable(root: str | os.PathLike[str], images: Sequence[str]) -> dict[str, str]:
    """Return the images (paths relative to ``root``) whose first bytes are not an image's, with what they are."""

    def problem(name: str) -> str | None:
        try:
            head = _head(os.path.join(root, name))
        except OSError as error:
            return error.strerror or type(error).__name__
        return None if image_suffix(head) else what_it_is(head)

    def problems(start: int) -> list[str | None]:
        return [problem(name) for name in images[start : start + PIECE]]

    with ThreadPoolExecutor(READ_AT_ONCE) as pool:  # over a network, latency dominates
        pieces = pool.map(problems, range(0, len(images), PIECE))
        found = zip(images, chain.from_iterable(pieces), strict=True)
        return {name: what for name, what in found if what}


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read all bytes of a file, or of a pipe such as the shell's ``<(command)``.

    Raises:
        OSError: it can't be read, is a device, or has more than ``MAX_BYTES``; TimeoutError: nobody
            writes to the pipe.
    """  # noqa: DOC501
    kind = os.stat(path).st_mode
    if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):  # /dev/zero has no end, a terminal waits
        raise OSError(errno.EINVAL, "a device, not a file")
    if not stat.S_ISFIFO(kind):
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise _too_long()
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise _too_long()
        return data
    pipe = os.open(
        path, os.O_RDONLY | os.O_NONBLOCK
    )  # else open would block forever without a writer
    try:
        return _all_of_pipe(pipe)
    finally:
        os.close(pipe)


def _all_of_pipe(pipe: int) -> bytes:
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    read = bytearray()
    while True:
        try:
            piece = os.read(pipe, 1 << 16)
            wait = WRITER_S  # no bytes: no writer has it open
        except BlockingIOError:
            piece, wait = None, BYTES_S
        if piece:
            read += piece
            if len(read) > MAX_BYTES:
                raise _too_long()
            continue
        if read and piece is not None:
            return bytes(read)
        happened = poll.poll(wait * 1000)
        if not happened:
            raise TimeoutError(f"nothing is writing to the pipe (waited {wait:g} seconds)")
        if not happened[0][1] & select.POLLIN:  # the writer has closed it
            return bytes(read)


def _too_long() -> OSError:
    return OSError(errno.EFBIG, f"more than {MAX_BYTES / 1e9:g} GB, too large for an image")


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def _is_image(path: str) -> bool:
    try:
        return image_suffix(_head(path)) is not None
    except OSError:
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino
