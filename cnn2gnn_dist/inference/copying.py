"""Copy a model's folder, also while its memory is edited."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.audit import folder as audit_folder
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory import decisions, edits, store
from cnn2gnn_dist.inference.memory.forgetting import keys_there
from cnn2gnn_dist.inference.memory.set_apart import SetApart
from cnn2gnn_dist.inference.memory.view import forgotten
from cnn2gnn_dist.log import quoted

LEFT_OUT = (store.LOCK, "*.tmp", artefact.AUDIT, *artefact.RECORDS)
"""Patterns of names that concern only the folder that is copied."""
ATTEMPTS = 20
"""Each but the first follows an edit during the one before."""


def copy_model(source: Path, target: Path, left_out: Collection[str] = LEFT_OUT) -> None:
    """Copy a model; its memory is one that was current meanwhile, and replaces one that is there.

    What that one had forgotten stays listed. An audit of it is deleted if the model has forgotten further images.

    Args:
        source: folder of a model.
        target: another folder, created if it is missing; other files in it are kept.
        left_out: patterns of names of files and folders that are not copied.

    Raises:
        UserError: the memory is damaged, or edited all the time; the target is the source, or has forgotten
            images that the source still has; its audit can't be deleted.
        FileNotFoundError: a file is missing.
        OSError: a file can't be read or written.
    """
    kept = forgotten(target / artefact.MEMORY)
    if kept:
        left_out = (*left_out, store.FORGOTTEN)
    for _ in range(ATTEMPTS):
        before = _look(source, left_out)
        try:
            check_target(source, target)
            # Both before the rest: what a kill leaves shows no forgotten image, and knows all of them.
            _forget_in_audit(source, target, kept)
            if kept:
                edits.record_forgotten(
                    target / artefact.MEMORY, forgotten(source / artefact.MEMORY)
                )
            _remove_memory(target / artefact.MEMORY)
            _copy(source, target, left_out)
            _check(target / artefact.MEMORY)
            artefact.check_files(target)
            return
        except (FileNotFoundError, UserError):
            if _look(source, left_out) == before:
                raise
    raise UserError(
        f"the memory was edited during each of {ATTEMPTS} attempts to copy it",
        where=str(source),
        remedy="copy it when fewer edits are made",
    )


def _files(folder: Path, left_out: Collection[str]) -> list[Path]:
    """Paths of all files, relative to the folder: HEAD before what it names, which is kept longest."""
    found = []
    for at, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _fits(name, left_out))
        found += [Path(at, name) for name in sorted(files) if not _fits(name, left_out)]
    return [path.relative_to(folder) for path in found]


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _look(source: Path, left_out: Collection[str]) -> tuple[list[str], list[Path]]:
    """What an edit of the memory changes: its HEAD, the checksums, and which files there are."""
    paths = (source / artefact.MEMORY / store.HEAD, source / artefact.CHECKSUMS)
    texts = [path.read_text(encoding="utf-8") if path.is_file() else "" for path in paths]
    return texts, _files(source, left_out)


def _copy(source: Path, target: Path, left_out: Collection[str]) -> None:
    for path in _files(source, left_out):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / path, target / path)


def _check(memory: Path) -> None:
    if (memory / store.HEAD).is_file():
        store.verify(memory, store.read_version(memory, store.head(memory)))


def check_target(source: Path, target: Path) -> None:
    """Check that a model may be copied to a folder; nothing is changed.

    Raises:
        UserError: it is the model's own, or images would come back that the model in it has forgotten.
    """
    if target.exists() and target.samefile(source):
        raise UserError(
            "a model can't be copied over itself", where=str(target), remedy="name another folder"
        )
    keys = forgotten(target / artefact.MEMORY)
    if not keys:
        return
    if back := keys_there(source / artefact.MEMORY, SetApart(source), keys):
        some = ", ".join(sorted(back)[:3]) + (", …" if len(back) > 3 else "")
        raise UserError(
            f"the model here has forgotten {len(back)} images that the new one still has: {some}",
            where=str(target),
            remedy=f"`cnn2gnn export {quoted(source)} --to {quoted(target)} --force` leaves them out; "
            "or name another folder",
        )


def _forget_in_audit(source: Path, target: Path, known: Collection[str]) -> None:
    """Delete an audit of the model that is there, if it may show images that the new one has forgotten since.

    Args:
        source: folder of the new model.
        target: the folder.
        known: what the model that is there has forgotten.

    Raises:
        UserError: it can't be deleted.
    """
    if not (target / artefact.MEMORY / store.HEAD).is_file():
        return  # no model is there: a folder of this name is none of ours
    folder = target / artefact.AUDIT
    gone = set(forgotten(source / artefact.MEMORY)).difference(known)
    try:
        if gone:
            audit_folder.forget(folder, gone)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the audit here, which may show images that the model has forgotten, can't be deleted: {error}",
            where=str(folder),
            remedy="delete this folder, and copy the model again",
        ) from None


def _remove_memory(memory: Path) -> None:
    """Remove a memory that is there: mixed with another one, it would keep what that one forgot."""
    # A folder of this name need not be a memory, and in one that is, only what is a memory's is removed.
    signs = (memory / store.HEAD, memory / store.LOCK, memory / store.FORGOTTEN)
    if not any(path.is_file() for path in (*signs, memory.with_name(artefact.CHECKSUMS))):
        return
    for name in ("segments", "versions"):
        if (memory / name).is_dir():
            shutil.rmtree(memory / name)
    # HEAD last: after a kill it still says what this is.
    for name in (store.LOCK, decisions.FILE, store.HEAD):
        (memory / name).unlink(missing_ok=True)
