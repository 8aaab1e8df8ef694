"""The files of a graph version: written by several ranks, complete or absent, pruned.

``v0003/`` holds ``x.npy`` (float16), ``z.npy``, ``labels.npy``, ``candidates.npy``,
``part.npy`` and a folder for each part. Several ranks fill ``v0003.tmp/``; rank 0 writes
``manifest.json`` and renames the folder. A folder without a valid manifest does not count.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.partition.parts import PartGraph
from cnn2gnn_dist.graph.row_file import RowFile, read_rows

MANIFEST = "manifest.json"
ATTEMPT = "attempt"
WORK_FOLDER = "work"
"""Folder of an unfinished version for intermediate files of the candidate search."""
Shapes = Mapping[str, tuple[tuple[int, ...], type]]


class GraphWriter:
    """A version being written; ranks write rows into preallocated arrays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, RowFile] = {}

    @classmethod
    def create(cls, root: Path, number: int, shapes: Shapes, attempt: str = "") -> GraphWriter:
        """Preallocate the arrays (rank 0).

        An unfinished version of the same ``attempt`` (a text that describes its inputs) is resumed;
        any other is deleted.

        Raises:
            UserError: the disk is full.
        """
        path = version_path(root, number).with_suffix(".tmp")
        note = path / ATTEMPT
        if attempt and note.is_file() and note.read_text(encoding="utf-8") == attempt:
            return cls(path)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        for name, (shape, kind) in shapes.items():
            durable.reserve_array(path / f"{name}.npy", shape, kind)
        if attempt:
            durable.write_text(note, attempt)
        return cls(path)

    @classmethod
    def open(cls, root: Path, number: int) -> GraphWriter:
        """Join a version that rank 0 has created."""
        return cls(version_path(root, number).with_suffix(".tmp"))

    def array(self, name: str) -> np.ndarray:
        """Map an array of the version again, so that what other ranks have written and synced is visible."""
        return read_rows(self.array_path(name))

    def array_path(self, name: str) -> Path:
        """Path of an array of the version."""
        return self.path / f"{name}.npy"

    def rows(self, name: str, start: int, values: np.ndarray, sum_before: int = 0) -> int:
        """Write rows ``start`` … of an array, without syncing. See ``RowFile.write``.

        Raises:
            IndexError: they don't fit.
        """
        if name not in self._files:
            self._files[name] = RowFile(self.array_path(name))
        return self._files[name].write(start, values, sum_before)

    def sync(self) -> None:
        """Wait until the rows written here are visible to all ranks."""
        for file in self._files.values():
            file.sync()

    def finalise(self, meta: dict[str, Any]) -> Path:
        """Write checksums of everything and the manifest, then rename (rank 0)."""
        self._close()
        files = {}
        for path in sorted(self.path.rglob("*")):
            durable.sync(path)
            if path.is_file():
                files[str(path.relative_to(self.path))] = [
                    path.stat().st_size,
                    durable.sha256(path),
                ]
        manifest = self.path / MANIFEST
        with durable.disk_full_reported(manifest, resumes=True):
            manifest.write_text(
                json.dumps({"files": files, "meta": meta}, indent=1), encoding="utf-8"
            )
        durable.sync(manifest)
        return self._rename()

    def place(self) -> Path:
        """Rename the folder as it is, without a manifest: another host finalises the version and hands it over."""
        self._close()
        return self._rename()

    def _close(self) -> None:
        self.sync()
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.path / WORK_FOLDER, ignore_errors=True)
        (self.path / ATTEMPT).unlink(missing_ok=True)

    def _rename(self) -> Path:
        durable.sync(self.path)
        final = self.path.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(self.path, final)
        durable.sync(final.parent)
        return final


@dataclass
class GraphVersion:
    """A complete version, memory-mapped.

    Attributes:
        x: float16 [N, D]; z: float32 [N, d]; labels: int32 [N]; candidates: int32 [N, M];
        part: int32 [N]; order: int32 [N], similar nodes next to each other; twin: int32 [N], the
        smallest of the nodes that are the same image; meta: what the builder recorded.
    """

    path: Path
    meta: dict[str, Any]

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in ("x", "z", "labels", "candidates", "part", "order", "twin"):
            raise AttributeError(name)
        array = np.load(self.path / f"{name}.npy", mmap_mode="r")
        self.__dict__[name] = array
        return array

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            UserError: a file is corrupt.
        """  # noqa: DOC501
        for name, (_, sha) in _read_manifest(self.path)[0].items():
            if durable.sha256(self.path / name) != sha:
                raise _damaged(self.path, f"{name}: its checksum does not match")


def version_path(root: Path, number: int) -> Path:
    """Folder of a version."""
    return Path(root) / f"v{number:04d}"


def part_path(version: Path, number: int) -> Path:
    """Folder of a part."""
    return version / f"part-{number:02d}"


def open_version(path: Path) -> GraphVersion:
    """Open a version, checking that its files exist and have the right sizes.

    Raises:
        UserError: missing or incomplete.
    """
    return GraphVersion(path, _read_manifest(path)[1])


def checksums(path: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of every file of a version, as it was when it was finished.

    Raises:
        UserError: missing or incomplete.
    """
    return _read_manifest(path)[0]


def latest_version(root: Path) -> Path | None:
    """The newest complete version; None if there is none."""
    newest_first = sorted(Path(root).glob("v????"), reverse=True)
    return next((path for path in newest_first if _is_complete(path)), None)


def load_part(version: GraphVersion, number: int) -> PartGraph:
    """Load a part as it was when the version was created, verified by ``part.json`` and its checksums.

    Raises:
        UserError: missing, corrupt, or of another version.
    """  # noqa: DOC501
    folder = part_path(version.path, number)
    name, note = folder.name, f"{folder.name}/part.json"
    files = _read_manifest(version.path)[0]
    if note not in files or durable.sha256(version.path / note) != files[note][1]:
        raise _damaged(version.path, f"{name} is not the partition built with this version")
    return PartGraph.load(folder)


def prune(root: Path, newest: Path, keep: int) -> None:
    """Keep ``keep`` (at least 1) complete versions up to ``newest``, the one just built.

    Newer ones are deleted: the run lost the epochs they belong to when it fell back to an older
    checkpoint. Unfinished attempts are deleted too.
    """
    versions = sorted(Path(root).glob("v????"))
    # A corrupt version doesn't count: keeping it could cost the last usable one.
    past = [path for path in versions if path.name <= newest.name and _is_complete(path)]
    kept = past[-max(keep, 1) :]
    for path in versions:
        if path not in kept:
            (path / MANIFEST).unlink(
                missing_ok=True
            )  # first: what is left without it doesn't count
            _remove(path)
    for unfinished in Path(root).glob("v????.tmp"):
        _remove(unfinished)


def _remove(folder: Path) -> None:
    """Remove a folder that doesn't count, now or at the next attempt.

    On NFS a file that a process of this host still maps stays in it, under a hidden name, until it is closed.
    """
    shutil.rmtree(folder, ignore_errors=True)


def _read_manifest(path: Path) -> tuple[dict[str, tuple[int, str]], dict[str, Any]]:
    """{file: (bytes, sha256)} and the builder's metadata; checks that every file has its size."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
        meta = dict(manifest["meta"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"no valid manifest ({error})") from None
    for name, (size, _) in files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise _damaged(path, f"{name} is missing or incomplete")
    return files, meta


def _is_complete(path: Path) -> bool:
    try:
        _read_manifest(path)
    except UserError:
        return False
    return True


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"this graph version can't be used: {what}",
        where=str(path),
        remedy="remove it; the stage rebuilds it",
    )
