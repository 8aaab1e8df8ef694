"""Folders of hosts that share none with rank 0's: what is in them counts once rank 0 has announced it.

Such a folder's note says that it is a copy. A host whose folder was one may be rank 0's in the next start: then
only what the storage's records name, with the same contents, stays.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cnn2gnn_dist import durable, ledger
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.run_storage.store import Record, Store

_log = logging.getLogger(__name__)

COPY = "copy"
"""Field of a folder's note."""


def read_note(root: Path) -> dict[str, Any]:
    """The note of a run's folder about its storage; empty without one."""
    try:
        note = json.loads((root / ledger.NOTE).read_text(encoding="utf-8"))
        return note if isinstance(note, dict) else {}
    except (OSError, ValueError):
        return {}


def is_copy(root: Path) -> bool:
    """Whether a folder is one host's copy of a run whose rank 0 worked on another host."""
    return bool(read_note(root).get(COPY))


def begin(root: Path, url: str) -> None:
    """Make a host's folder a copy of the run in this storage; what it has of that run stays.

    Raises:
        UserError: it holds something else; it can't be written to.
    """
    ledger.check_claim(root)
    url = url.rstrip("/")
    if (root / ledger.CONFIG).is_file() and read_note(root).get("url") != url:
        raise UserError(
            f"this folder holds another run than {url}",
            where=f"run.dir={root}",
            remedy="an empty folder on each host, or another run.storage",
        )
    durable.create_folder(root)
    durable.write_text(root / ledger.NOTE, json.dumps({"url": url, COPY: True}, indent=1))


def check_whole(root: Path) -> None:
    """Check that a folder which is used without its storage is not a copy.

    Raises:
        UserError: it is.
    """
    if is_copy(root):
        url = read_note(root).get("url")
        raise UserError(
            f"this folder is one host's copy of the run in {url}",
            where=f"run.dir={root}",
            remedy=f"run.storage={url}",
        )


def check_held(root: Path, store: Store) -> None:
    """Check that a copy's run is in this storage, before what the storage does not hold is removed from it.

    Raises:
        UserError: the copy is of a run in another storage, or the storage holds nothing and the copy has results.
    """
    note = read_note(root)
    if not note.get(COPY):
        return
    made = any(next(root.glob(f"*/{name}"), None) for name in (ledger.DONE, "checkpoints/*"))
    if note.get("url") != store.url or (made and not store.records):
        raise UserError(
            f"this folder is one host's copy of the run in {note.get('url')}, which {store.url} does not hold",
            where=f"run.dir={root}",
            remedy=f"run.storage={note.get('url')}, if it still holds the run; or an empty run.dir",
        )


def keep_stored(root: Path, store: Store, run: str) -> None:
    """Remove from a copy what the storage's records don't name, or name with other contents.

    Args:
        root: the folder.
        store: whose records were read.
        run: the record of the files that belong to no stage.
    """
    removed = 0
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if ".old-" not in folder.name and not folder.name.startswith((".", "ray-logs")):
            removed += _keep(folder, store.records.get(folder.name, Record({})))
    for path in _files_of_the_run(root):
        kept = store.records.get(run, Record({})).files.get(path.name)
        if path.name != ledger.CONFIG and not (kept and kept.sha256 == durable.sha256(path)):
            path.unlink()
    if removed:
        _log.info(
            f"this folder was a copy of another host's: {removed} files that are not in "
            f"{store.url} are removed"
        )


def _files_of_the_run(root: Path) -> Iterator[Path]:
    yield from (p for p in root.iterdir() if p.is_file() and not p.name.startswith("."))


def _keep(folder: Path, record: Record) -> int:
    removed = 0
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
            continue
        kept = record.files.get(str(path.relative_to(folder)))
        # The records that decide a stage's state are restored last.
        if path.name in (ledger.DONE, "begin.json", ledger.HELD) or not (
            kept and path.stat().st_size == kept.size and durable.sha256(path) == kept.sha256
        ):
            path.unlink()
            removed += 1
    if not any(folder.iterdir()):
        shutil.rmtree(folder)
    return removed
