"""The files of a memory: immutable segments of rows, immutable versions, and which one is current.

    memory/HEAD                      number of the current version
    memory/segments/000001/          x.npy z.npy labels.npy (candidates.npy) rows.parquet segment.json
    memory/versions/000003/          version.json and what it changes: removed.npy relabelled.npy
                                     changed.npy changed_rows.npy added.npy (before 28 Nov 2026:
                                     heads_rows.npy heads_logits.npy)
    memory/forgotten.csv             keys that later trainings leave out (``data.relabel`` reads it)

An edit writes a segment and a version and then replaces HEAD: after a kill the previous version is current.
Rows are numbered through the segments of a version; ``classes`` only grow until compaction.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError

FORMAT = 1
HEAD, LOCK, FORGOTTEN = "HEAD", ".lock", "forgotten.csv"
ROWS = "rows.parquet"
VERIFIED_BYTES = 256 << 20
"""Up to this size a memory's checksums are compared whenever a model is opened."""
DROPPED = 1000
"""Most versions that a compaction leaves a mark of."""


@dataclass(frozen=True)
class ClassEntry:
    """A class: its name, and whether the network has a logit for it."""

    name: str
    trained: bool


@dataclass(frozen=True)
class Version:
    """``version.json``.

    Attributes:
        number, parent: of this version and of the one it was made from; None: none.
        made: UTC time, ISO 8601.
        action: what was done, for people.
        segments: (name, rows) in the order of row numbers.
        classes: the labels index into them.
        files: name → [bytes, SHA-256] of the arrays next to it.
        heads: how new classes are scored (``inference/memory/new_classes.py``); empty without any.
        dropped: marks (``mark``) of versions that compactions have deleted, oldest first; None: there are none, or an
            earlier version of this package compacted.
    """

    number: int
    parent: int | None
    made: str
    action: str
    segments: tuple[tuple[str, int], ...]
    classes: tuple[ClassEntry, ...]
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    heads: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] | None = None

    @property
    def rows(self) -> int:
        """Rows of all segments, including removed ones."""
        return sum(rows for _, rows in self.segments)


@dataclass(frozen=True)
class NewRows:
    """n rows to store.

    Attributes:
        x: float16 [n, D]; z: float32 [n, d]; labels: int32 [n]; candidates: int32 [n, M] or None.
        keys, sources: n names, and where each image is (for people; may be empty).
        thumbnails: n JPEGs, None where there is none.
    """

    x: np.ndarray
    z: np.ndarray
    labels: np.ndarray
    candidates: np.ndarray | None
    keys: Sequence[str]
    sources: Sequence[str]
    thumbnails: Sequence[bytes | None]


def head(root: Path) -> int:
    """Return the number of the current version.

    Raises:
        UserError: the memory is missing or damaged.
    """  # noqa: DOC501
    try:
        return int((root / HEAD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(root / HEAD, str(error)) from None


def read_version(root: Path, number: int) -> Version:
    """Read a version and check the sizes of its files.

    Raises:
        UserError: it is missing or damaged, or of a newer format.
    """  # noqa: DOC501
    folder = version_folder(root, number)
    file = folder / "version.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if int(tree["format"]) > FORMAT:
            raise UserError(
                f"this memory has format {tree['format']}, and this version reads {FORMAT}",
                where=str(root),
                remedy="upgrade cnn2gnn-dist",
            )
        if tree.get("digest") not in (None, _digest(tree)):
            raise damaged(file, "its checksum does not match")
        version = Version(
            number=int(tree["number"]),
            parent=tree["parent"],
            made=str(tree["made"]),
            action=str(tree["action"]),
            segments=tuple((str(name), int(rows)) for name, rows in tree["segments"]),
            classes=tuple(ClassEntry(str(c["name"]), bool(c["trained"])) for c in tree["classes"]),
            files={str(k): (int(size), str(sha)) for k, (size, sha) in tree["files"].items()},
            heads=dict(tree["heads"]),
            dropped=None if tree.get("dropped") is None else tuple(map(str, tree["dropped"])),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(file, str(error)) from None
    if strange := [name for name, _ in version.segments if not name.isdigit()]:
        raise damaged(file, f"{strange[0]!r} is not a segment")
    _check(folder, version.files, read=False)
    for name, _ in version.segments:
        _check(segment_folder(root, name), segment_files(root, name), read=False)
    return version


def current_version(root: Path) -> Version:
    """Read the current version, also if a compaction replaces it meanwhile.

    Raises:
        UserError: it is missing or damaged.
    """
    while True:
        number = head(root)
        try:
            return read_version(root, number)
        except UserError:
            if head(root) == number:
                raise


def verify(root: Path, version: Version) -> None:
    """Read the files of a version and compare their checksums.

    Raises:
        UserError: one is damaged.
    """
    _check(version_folder(root, version.number), version.files, read=True)
    for name, _ in version.segments:
        _check(segment_folder(root, name), segment_files(root, name), read=True)


def check(root: Path, version: Version, wanted: bool | None) -> None:
    """``verify`` if it is wanted; None: if the version is small."""
    if wanted or (wanted is None and size(root, version) <= VERIFIED_BYTES):
        verify(root, version)


def digest(root: Path, version: Version) -> str:
    """SHA-256 of what answers depend on, by the checksums of files: not of when and how it was made."""
    content = [
        [[c.name, c.trained] for c in version.classes],
        version.files,
        version.heads,
        [segment_files(root, name) for name, _ in version.segments],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def mark(digest_of_version: str) -> str:
    """What is kept of a version's digest when it is deleted: enough to tell whether a memory was once that version."""
    return digest_of_version[:16]


def marks(root: Path, version: Version) -> tuple[str, ...]:
    """``Version.dropped`` of the one that is to replace all versions on disk; ``version``: the current one.

    Undone ones count as well, since a server may still answer from them.
    """
    found = list(version.dropped or ())
    for number in numbers(root)[-DROPPED:]:
        with suppress(UserError):  # damaged: no server has it, or it will be restarted
            found.append(mark(digest(root, read_version(root, number))))
    return tuple(dict.fromkeys(found))[-DROPPED:]


def size(root: Path, version: Version) -> int:
    """Bytes of the files of a version."""
    parts = [version.files, *(segment_files(root, name) for name, _ in version.segments)]
    return sum(size for files in parts for size, _ in files.values())


def version_folder(root: Path, number: int) -> Path:
    """Folder of a version."""
    return root / "versions" / f"{number:06d}"


def segment_folder(root: Path, name: str) -> Path:
    """Folder of a segment."""
    return root / "segments" / name


def segment_files(root: Path, name: str) -> dict[str, tuple[int, str]]:
    """Sizes and SHA-256 of a segment's files.

    Raises:
        UserError: it is missing or damaged.
    """  # noqa: DOC501
    file = segment_folder(root, name) / "segment.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))["files"]
        return {str(key): (int(size), str(sha)) for key, (size, sha) in tree.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(file, str(error)) from None


def keys_on_disk(root: Path) -> set[str]:
    """The keys of all segments, including those of removed images and earlier versions."""
    return {key for key, _ in images_on_disk(root)}


def images_on_disk(root: Path) -> set[tuple[str, str]]:
    """The same with the name of the file (a shard, for training images) that each image came from; may be empty."""
    found: set[tuple[str, str]] = set()
    for name in segments(root):
        table = pq.read_table(segment_folder(root, name) / ROWS, columns=["key", "source"])
        keys, sources = (table[column].to_pylist() for column in ("key", "source"))
        found.update((key, source or "") for key, source in zip(keys, sources, strict=True))
    return found


def segments(root: Path) -> list[str]:
    """The names of all segments that were completed, ascending; what a killed edit left is not one."""
    return sorted(path.name for path in (root / "segments").glob("[0-9]*") if path.name.isdigit())


def numbers(root: Path) -> list[int]:
    """The numbers of all versions, ascending."""
    return sorted(int(path.name) for path in (root / "versions").glob("[0-9]" * 6))


def write_segment(root: Path, rows: NewRows) -> str:
    """Write a segment; return its name. The caller holds ``editing``.

    Raises:
        UserError: the disk is full; nothing is left behind.
    """
    name = f"{1 + max(map(int, segments(root)), default=-1):06d}"
    with _new_folder(segment_folder(root, name)) as folder:
        arrays = {"x": rows.x, "z": rows.z, "labels": rows.labels}
        if rows.candidates is not None:
            arrays["candidates"] = rows.candidates
        kinds = {"x": np.float16, "z": np.float32, "labels": np.int32, "candidates": np.int32}
        for key, array in arrays.items():
            durable.write_array(folder / f"{key}.npy", np.asarray(array, kinds[key]))
        pq.write_table(_table(rows), folder / ROWS, row_group_size=256)
        durable.write_json(folder / "segment.json", {"files": _digests(folder)})
    return name


def write_version(root: Path, version: Version, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a version with its arrays, and make it the current one.

    Raises:
        UserError: the disk is full; the previous version stays current.
    """
    with _new_folder(version_folder(root, version.number)) as folder:
        for name, array in arrays.items():
            durable.write_array(folder / f"{name}.npy", array)
        tree: dict[str, Any] = {
            "format": FORMAT,
            "number": version.number,
            "parent": version.parent,
            "made": version.made,
            "action": version.action,
            "segments": version.segments,
            "classes": [{"name": c.name, "trained": c.trained} for c in version.classes],
            "files": _digests(folder),
            "heads": dict(version.heads),
        }
        if version.dropped is not None:
            tree["dropped"] = version.dropped
        durable.write_json(folder / "version.json", tree | {"digest": _digest(tree)})
    set_head(root, version.number)


def set_head(root: Path, number: int) -> None:
    """Make a version the current one (atomically)."""
    with durable.disk_full_reported(root / HEAD):
        durable.write_text(root / HEAD, f"{number}\n")


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def damaged(path: Path, why: str) -> UserError:
    """Return the error for a file of a memory that is missing or damaged."""
    return UserError(
        f"the model's memory is damaged: {why}",
        where=str(path),
        remedy="copy the model again from its source, or `cnn2gnn export RUN --to MODEL`",
    )


@contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with durable.disk_full_reported(final):
            yield temporary
            for path in temporary.iterdir():
                durable.sync(path)
        durable.sync(temporary)
        os.replace(temporary, final)
        durable.sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _digest(tree: Mapping[str, Any]) -> str:
    """SHA-256 of a version's description, without the digest itself."""
    content = {name: value for name, value in tree.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, list[Any]]:
    return {
        path.name: [path.stat().st_size, durable.sha256(path)]
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _check(folder: Path, files: Mapping[str, tuple[int, str]], *, read: bool) -> None:
    for name, (size, sha) in files.items():
        path = folder / name
        if Path(name).name != name:
            raise damaged(path, "it is not a file of the memory")
        try:
            found = path.stat().st_size
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from None
        if found != size:
            raise damaged(path, f"it has {found} bytes, {size} when it was written")
        try:
            right = not read or durable.sha256(path) == sha
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from None
        if not right:
            raise damaged(path, "its checksum does not match")


def _table(rows: NewRows) -> pa.Table:
    thumbnail = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [
        None if data is None else {"bytes": data, "path": f"{key}.jpg"}
        for key, data in zip(rows.keys, rows.thumbnails, strict=True)
    ]
    return pa.table(
        {
            "key": pa.array(list(rows.keys), pa.string()),
            "source": pa.array(list(rows.sources), pa.string()),
            "thumbnail": pa.array(pictures, thumbnail),
        }
    )
