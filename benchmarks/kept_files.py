"""Files that a benchmark keeps for its next run: used again only if they would be made in the same way."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cnn2gnn_dist import durable


@contextmanager
def made_from(source: str, target: Path) -> Iterator[bool]:
    """Context in which a file or folder is made unless it is there; gives whether it has to be.

    One that is not of this source, by the note next to it, has to be made again: what another preset or other overrides
    have left must not pass for it. The note is written at the end.
    """
    note = target.with_name(f"{target.name}.made-from")
    known = note.read_text() if note.is_file() and target.exists() else None
    if known != source and target.exists():
        print(f"{target} was made from something else: made again", file=sys.stderr)
    note.unlink(missing_ok=True)
    yield known != source
    note.write_text(source)


def digest(*settings: object, files: Iterable[Path] = ()) -> str:
    """Digest of what a file is made from: settings (as JSON) and files, by their names and contents.

    Of modules, too: an edited comment counts as a change, and so does an edited constant.
    """
    told = [[file.name, durable.sha256(file)] for file in sorted(files)]
    return hashlib.sha256(json.dumps([settings, told]).encode()).hexdigest()[:20]


def lines_made_from(source: str, file: Path) -> list[dict[str, Any]]:
    """Lines of JSON that ``add_line`` has kept for this source. Others stay in the file, but don't count.

    Neither does a line that a kill cut off.
    """
    lines = durable.read_lines(file) if file.exists() else []
    own = [line for line in lines if line.get("made_from") == source]
    if others := len(lines) - len(own):
        print(f"{file}: lines made from something else: {others}", file=sys.stderr)
    return own


def add_line(source: str, file: Path, line: dict[str, Any]) -> None:
    """Keep a line of JSON that is made from this source."""
    with open(file, "ab+") as lines:
        if lines.tell() and not _ends_a_line(lines):
            lines.write(b"\n")
        lines.write(f"{json.dumps(line | {'made_from': source})}\n".encode())


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
