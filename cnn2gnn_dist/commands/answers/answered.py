"""Which input a file of answers is of, and whether that has changed since: a record beside each file.

``.part-0.tar.parquet.json`` beside ``part-0.tar.parquet``: the input's path, a hash of its names, lengths
and times as they were before it was read, and the number of images that could not be read. So an image
deep in a folder counts, a copy that kept an old time too, another input of the same name is not taken for
this one, and what could not be read is not forgotten.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.images.image_files import find_images, printable
from cnn2gnn_dist.errors import UserError

Look = dict[str, str]
"""``input``: its absolute path; ``look``: the hash."""


def look_at(given: str) -> Look | None:
    """Describe an input as it is now; None: there is no such file or folder, or it can't be looked at."""
    found = hashlib.sha256()
    try:
        names = find_images(given).images if os.path.isdir(given) else [""]
        for name in names:
            about = os.stat(os.path.join(given, name) if name else given)
            line = json.dumps([printable(name), about.st_size, about.st_mtime_ns])
            found.update(f"{line}\n".encode())
    except OSError:  # also a path through a file, a folder that may not be listed
        return None
    return {"input": printable(os.path.abspath(given)), "look": found.hexdigest()}


def record(target: Path, look: Look | None, unreadable: int) -> None:
    """Note of which input a complete file of answers is, and how many of its images could not be read."""
    note = (look or {}) | {"unreadable": unreadable}
    durable.write_text(_path(target), json.dumps(note, indent=1), shared=True)


def unreadable(target: Path) -> int:
    """Number of images of an answered input that could not be read; 0 where it was not recorded."""
    found = _note(target).get("unreadable", 0)
    return found if isinstance(found, int) else 0


def is_answered(given: str, target: Path) -> bool:
    """Whether the answers are there, and of the input as it is now.

    Raises:
        UserError: they are of another input of the same name.
    """
    if not target.is_file():
        return False
    now, then = look_at(given), _recorded(target)
    if then is None and "unreadable" in _note(target):  # there was no such input
        return now is None
    if then is None:  # of a version that kept no record
        return now is None or _newest(given) <= target.stat().st_mtime
    if now is None:
        return then["input"] == printable(os.path.abspath(given))
    if now["look"] == then["look"] and _is_same(given, then["input"]):
        return True
    if now["input"] != then["input"]:
        raise UserError(
            f"the answers that are there are of another input of this name, {then['input']}",
            where=str(target),
            remedy="name another folder, or remove this file if that input was moved and changed",
        )
    return False


def _is_same(given: str, recorded: str) -> bool:
    """Whether an input that looks like a recorded one is that one: names, sizes and times of two may agree."""
    if printable(os.path.abspath(given)) == recorded:
        return True
    try:
        return os.path.samefile(given, recorded)  # by another name
    except OSError:
        return not os.path.lexists(recorded)  # it was moved


def _path(target: Path) -> Path:
    return target.with_name(f".{target.name}.json")


def _recorded(target: Path) -> Look | None:
    found = _note(target)
    return {name: str(found[name]) for name in ("input", "look")} if "look" in found else None


def _note(target: Path) -> dict[str, Any]:
    try:
        found = json.loads(_path(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _newest(given: str) -> float:
    """The latest time of an input: of a file, or of a folder and everything in it."""
    paths = [given]
    for folder, folders, files in os.walk(given):
        paths += [os.path.join(folder, name) for name in (*folders, *files)]
    return max(os.lstat(path).st_mtime for path in paths)
