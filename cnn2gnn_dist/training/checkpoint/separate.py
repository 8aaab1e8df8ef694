"""Checkpoints of hosts that share no folder: complete in each, or they don't count."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.shared_files import handover, host_folders
from cnn2gnn_dist.runtime.shared_files.exchange_by_store import NowhereFound
from cnn2gnn_dist.training.checkpoint import folder as disk

_log = logging.getLogger(__name__)


def written(path: Path) -> dict[str, handover.Written]:
    """The files of a checkpoint as they were written, and its manifest."""
    listed = {name: handover.Written(*one) for name, one in disk.checksums(path).items()}
    return listed | handover.described(path, {disk.MANIFEST: True})


def newest(root: Path) -> Path | None:
    """The newest checkpoint that every host has now, from each other where it is needed (collective).

    Newer ones, of which no host has all that one lacks, are left out with a warning.
    """
    host_folders.in_each(lambda: disk.recover(root))
    folders: list[Path] = collectives.alone(lambda: disk.all_of(root))
    for folder in reversed(folders):
        problem = _completed(folder)
        if problem is None:
            return folder
        if collectives.rank() == 0:
            _log.warning(f"checkpoint {folder.name} is skipped: {problem}")
    return None


def complete_older(root: Path, kept: Path) -> None:
    """Complete the checkpoints before ``kept`` in each folder; remove those that can't be (collective).

    Otherwise parts of them would count as what there is to fall back to, and be stored with the finished training.
    """
    folders: list[Path] = collectives.alone(lambda: disk.all_of(root))
    for folder in folders:
        if folder.name < kept.name and (problem := _completed(folder)) is not None:
            if collectives.rank() == 0:
                _log.warning(f"checkpoint {folder.name} is removed: {problem}")
            host_folders.in_each(partial(_remove, root, folder))


def _completed(folder: Path) -> str | None:
    """Give every host what it lacks of a checkpoint; why that is impossible, if it is (collective)."""
    problem: str | None = collectives.alone(partial(disk.manifest_damage, folder))
    if problem is None:
        try:
            handover.hand_over(folder, partial(written, folder))
        except NowhereFound as error:
            problem = error.what
    return problem


def _remove(root: Path, folder: Path) -> None:
    if disk.best_of(root) == folder:
        (root / disk.BEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)
