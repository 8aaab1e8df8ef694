"""Which files of a folder are stored, with sizes and checksums, held so that their contents stay the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from cnn2gnn_dist import durable
from cnn2gnn_dist.graph import version
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder

Known = Mapping[str, tuple[int, str]]
"""Bytes and SHA-256 by path relative to the stage's folder."""
Source = tuple[int, str, bytes | Path | None]
"""Bytes, SHA-256 and contents (or their path) of a file; None: another host has stored them."""
_LEFT_OUT = {"tensorboard", "dense", "work"}
"""Folders that the run recreates from what is stored, or does without."""
_SMALL = ("begin.json", "metrics.jsonl", "checkpoints/latest", "checkpoints/best")


class Contents:
    """Files as they were at one moment, whatever happens to their names afterwards.

    A training's files grow or are pruned during the upload: so small ones are held in memory, and checkpoint
    files are held open. A graph version has many files and stays for an epoch: its files are only named.
    """

    def __init__(self, known: Known | None = None, elsewhere: Known | None = None) -> None:
        self._known: Known = known or {}
        self._elsewhere: Known = elsewhere or {}
        self.sources: dict[str, Source] = {}
        self._open: list[BinaryIO] = []

    def add_text(self, name: str, path: Path) -> None:
        """Add a small file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            self.sources[name] = (len(data), hashlib.sha256(data).hexdigest(), data)

    def add_open(self, name: str, path: Path, size: int, sha256: str) -> None:
        """Add a file whose checksum is known; one that is already stored is not opened."""
        if (size, sha256) == self._elsewhere.get(name) and not path.is_file():
            self.sources[name] = (size, sha256, None)
            return
        if (size, sha256) == self._known.get(name) or not name.startswith("checkpoints/"):
            self.sources[name] = (size, sha256, path)
            return
        file = open(path, "rb")  # noqa: SIM115 (until ``close``)
        self._open.append(file)
        self.sources[name] = (size, sha256, Path(f"/proc/self/fd/{file.fileno()}"))

    def close(self) -> None:
        """Close the files."""
        for file in self._open:
            file.close()
        self._open = []


def of_training(folder: Path, known: Known, elsewhere: Known | None = None) -> Contents:
    """What a training in progress needs to be resumed: its complete checkpoints, graphs and metrics.

    Args:
        folder: of the stage.
        known: files that are already stored.
        elsewhere: files that other hosts, with folders of their own, have stored.

    Raises:
        OSError: something can't be read.
    """
    found = Contents(known, elsewhere)
    try:
        for name in _SMALL:
            found.add_text(name, folder / name)
        for relative, files in _with_sums(folder, elsewhere or {}):
            manifest = f"{relative}/{version.MANIFEST}"
            found.add_text(manifest, folder / manifest)
            for name, (size, sha) in files.items():
                found.add_open(f"{relative}/{name}", folder / relative / name, size, sha)
    except BaseException:
        found.close()
        raise
    return found


def of_stage(folder: Path, elsewhere: Known | None = None) -> dict[str, Source]:
    """All files of a complete stage that others read, or from which training resumes.

    Args:
        folder: of the stage.
        elsewhere: files that other hosts, with folders of their own, have stored.

    Raises:
        OSError: something can't be read.
    """
    sums = {
        f"{relative}/{name}": one
        for relative, files in _with_sums(folder, elsewhere or {})
        for name, one in files.items()
    }
    found: dict[str, Source] = {
        name: (*one, None) for name, one in sums.items() if not (folder / name).is_file()
    }
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or not all(map(_counts, name.parts)):
            continue
        size, sha = sums.get(str(name)) or (path.stat().st_size, durable.sha256(path))
        found[str(name)] = (size, sha, path)
    return found


def _counts(part: str) -> bool:
    return (
        part not in _LEFT_OUT and not part.startswith(".") and not part.endswith((".tmp", ".old"))
    )


def _with_sums(folder: Path, elsewhere: Known) -> Iterator[tuple[str, Known]]:
    """The complete checkpoints and graph versions of a stage, relative to it, with their files' checksums.

    Their files are in the folder, or known to be stored by other hosts.
    """
    checkpoints = checkpoint_folder.all_of(checkpoint_folder.root_of(folder))
    for path in [*checkpoints, *sorted(folder.glob("graph/v????"))]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            listed = json.loads((path / version.MANIFEST).read_text(encoding="utf-8"))["files"]
            files = {str(name): (int(size), str(sha)) for name, (size, sha) in listed.items()}
            relative = str(path.relative_to(folder))
            if all(
                (path / name).stat().st_size == one[0]
                if (path / name).is_file()
                else elsewhere.get(f"{relative}/{name}") == one
                for name, one in files.items()
            ):
                yield relative, files
