"""Which folder holds the model that a user names: the folder itself, or that of a run in which it is current."""

from __future__ import annotations

from pathlib import Path

from cnn2gnn_dist import ledger
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.folder import artefact

MODEL = "model"
"""Folder of a run with its model."""


def model_of_run(run: Path) -> Path | None:
    """The model in a run, if it is complete and made from the run's current student.

    Raises:
        UserError: its record is there, but its files are not (a host of a run with ``run.storage`` has few of them).
    """
    entry, student = ledger.finished(run / MODEL), ledger.finished(run / "student")
    if entry is None or student is None or entry.inputs.get("student") != student.digest:
        return None
    if not (run / MODEL / artefact.CONFIG).is_file():
        raise UserError(
            "this run's model is finished, but its files are not in this folder",
            where=str(run / MODEL),
            remedy="if the run has run.storage, they are there: name its URL instead of the folder; "
            "otherwise `cnn2gnn run --update` with the run's config writes them again",
        )
    return run / MODEL


def located(folder: Path) -> Path:
    """The folder of the model that a folder is, or contains; a folder that does neither is returned as it is.

    Raises:
        UserError: a run without a model of its current student, or without that model's files.
    """
    inside = folder / MODEL
    if not is_run(folder):
        contained = (inside / artefact.CONFIG).is_file()
        return inside if contained and not (folder / artefact.CONFIG).is_file() else folder
    if (found := model_of_run(folder)) is not None:
        return found
    if not (inside / artefact.CONFIG).is_file():
        raise UserError(
            "this run has no model yet",
            where=str(folder),
            remedy="finish it with `cnn2gnn run`; or `cnn2gnn export RUN --to MODEL`, and name MODEL",
        )
    raise UserError(
        "the model of this run is unfinished, or not made from the run's current student",
        where=str(folder),
        remedy=f"`cnn2gnn run --update` with the run's config makes a new one; to use the old one, name {inside}",
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, finished or not, rather than a model."""
    there = (folder / ledger.CONFIG).is_file() or (folder / "student").is_dir()
    return there and not (folder / artefact.CONFIG).is_file()
