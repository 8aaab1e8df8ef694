"""The files that a stage has left on disk, and whether they are valid: ``begin.json`` and ``done.json``.

A stage's key is a hash of the config fields and inputs that determine its outputs
(:mod:`cnn2gnn_dist.pipeline.keys`).
``begin.json`` contains the key while the stage works, ``done.json`` once it is complete. A folder
with another key is never written into: it is refused, or set aside at the user's request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError

SCHEMA = 2
"""Version of how keys are derived from fields. Records without it have schema 1, whose reader is
:mod:`cnn2gnn_dist.pipeline.keys_v1`."""
DONE = "done.json"
"""File in the folder of a complete stage."""
CONFIG = "config.yaml"
"""File in a run's folder: the config of the last command that was not refused."""
HELD = ".stored.json"
"""File in a stage's folder: those of its files that are in the run's storage (``run.storage``), whether or
not they are on this disk as well."""
NOTE = ".storage.json"
"""File in a run's folder: which parts of the stored run are on this disk."""


class Status(Enum):
    """State of a stage."""

    FRESH = "to run"
    RESUME = "to resume"
    COMPLETE = "complete"
    STALE = "stale"


@dataclass(frozen=True)
class Entry:
    """The record of one stage folder.

    ``key`` identifies config and inputs, ``digest`` the outputs (downstream keys build on
    it), ``parts`` are the config fields behind the key, including those at their defaults, ``outputs``
    (relative path, bytes), ``inputs`` the digests of what it was built on, ``schema`` how the key
    was derived from them.
    """

    key: str
    parts: dict[str, Any]
    digest: str = ""
    outputs: tuple[tuple[str, int], ...] = ()
    seconds: float = 0.0
    inputs: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


def key_of(
    stage: str, parts: Mapping[str, Any], inputs: Mapping[str, str], schema: int = SCHEMA
) -> str:
    """Hex key of a stage's config fields and its inputs' digests."""
    return _hex([schema, stage, dict(parts), dict(inputs)])


def digest_of(kind: str, contents: Mapping[str, Any]) -> str:
    """Hex digest of contents that keys build on; the same under every key schema."""
    return _hex([1, kind, dict(contents), {}])


def _hex(content: list[Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def recorded(folder: Path) -> Entry | None:
    """The record of a finished stage, else of one that has begun; None if there is none."""
    return _read(folder / DONE) or _read(folder / "begin.json")


def status(folder: Path, key: str) -> tuple[Status, Entry | None]:
    """Compare a stage's folder with its expected key."""
    done = _read(folder / DONE)
    if done is not None:
        if done.key != key:
            return Status.STALE, done
        return (Status.RESUME if missing(folder, done) else Status.COMPLETE), done
    begun = _read(folder / "begin.json")
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if begun is None or (begun.key != key and there == ["begin.json"]):
        return (Status.STALE, None) if begun is None and there else (Status.FRESH, None)
    return (Status.RESUME if begun.key == key else Status.STALE), begun


def begin(folder: Path, entry: Entry) -> None:
    """Mark a folder as in progress under this key."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    _write(folder / "begin.json", entry)


def finish(folder: Path, entry: Entry) -> None:
    """Mark a folder as complete."""
    _write(folder / DONE, entry)


def outputs(folder: Path, names: list[Path]) -> tuple[tuple[str, int], ...]:
    """Relative path and size of each output file."""
    return tuple((str(n.relative_to(folder)), n.stat().st_size) for n in sorted(names))


def set_aside(folder: Path) -> Path:
    """Rename a stale folder out of the way, deleting nothing; return its new name."""
    target = name_aside(folder)
    folder.rename(target)
    return target


def name_aside(folder: Path) -> Path:
    """The name that a folder gets if it is set aside now."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return target


def claim(root: Path, config_yaml: str) -> None:
    """Make ``root`` a run's folder with this config, or check that it is one; its config then stays.

    Raises:
        UserError: the folder contains something else.
    """
    check_claim(root)
    if not (root / CONFIG).exists():
        root.mkdir(parents=True, exist_ok=True)
        record_config(root, config_yaml)


def record_config(root: Path, config_yaml: str) -> None:
    """Record the config of a command that was not refused."""
    durable.write_text(root / CONFIG, config_yaml)


def check_claim(root: Path) -> None:
    """Check that ``root`` is a run's folder, or may become one.

    Raises:
        UserError: it is a file, or the folder contains something else.
    """
    if (root.exists() or root.is_symlink()) and not root.is_dir():
        raise UserError(
            "this is not a folder",
            where=str(root),
            remedy="choose another folder: run.dir=…",
        )
    there = (
        [path for path in root.iterdir() if not path.name.startswith((".lock", NOTE))]
        if root.is_dir()
        else []
    )
    if there and not (root / CONFIG).exists():
        raise UserError(
            "this folder is not empty and is not a run folder",
            where=str(root),
            remedy="choose another folder: run.dir=…",
        )


def finished(folder: Path) -> Entry | None:
    """The record of a finished stage; None if it is not finished."""
    return _read(folder / DONE)


def held(folder: Path) -> dict[str, int]:
    """Bytes of the files of a stage that are in the run's storage, by relative path; empty without one."""
    try:
        raw = json.loads((folder / HELD).read_text(encoding="utf-8"))
        return {str(name): int(size) for name, size in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def missing(folder: Path, entry: Entry) -> str:
    """The first output that is missing or has the wrong size; empty if all are valid.

    A file in the run's storage is not missing: it is fetched when it is needed.
    """
    stored = held(folder)
    for name, size in entry.outputs:
        path = folder / name
        if not path.is_file():
            if stored.get(name) == size:
                continue
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return ""


def _read(path: Path) -> Entry | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Entry(
            key=raw["key"],
            parts=raw["parts"],
            digest=raw["digest"],
            outputs=tuple((str(name), int(size)) for name, size in raw["outputs"]),
            seconds=float(raw["seconds"]),
            inputs=dict(raw.get("inputs", {})),
            schema=int(raw.get("schema", 1)),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, entry: Entry) -> None:
    durable.write_text(path, json.dumps(entry.__dict__, indent=1))
