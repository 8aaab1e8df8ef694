"""Open what a user names as a model: its folder, or a run with a trained student."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.folder.run_model import is_run, located, model_of_run
from cnn2gnn_dist.log import quoted

if TYPE_CHECKING:  # needs training's packages, which a machine that only answers may not have
    from cnn2gnn_dist.stages.shared.context import Context

_log = logging.getLogger(__name__)


@contextmanager
def opened(folder: Path, device: str = "auto", *, edited: bool = False) -> Iterator[Classifier]:
    """Open a model or a run's model; if the run has no current one, a temporary one is made from it.

    Args:
        folder: of the model or run.
        device: see ``Classifier.open``.
        edited: the memory may be edited: a temporary model, with which edits would vanish, is refused.

    Raises:
        UserError: neither a model nor a finished run.
    """
    named = located(folder) if not is_run(folder) else model_of_run(folder)
    if named is not None and (named != folder or (folder / artefact.CONFIG).is_file()):
        yield Classifier.open(named, device=device)
        return
    context = context_of(folder)
    if edited:
        raise UserError(
            "this run has no model of its current student, so edits of the memory could not be kept",
            where=str(folder),
            remedy=f"`cnn2gnn export {quoted(folder)} --to MODEL`, and name MODEL; or leave out the token",
        )
    from cnn2gnn_dist.stages.model import write_model

    _log.info(
        f"{folder} has no model of its current student: a temporary one is made from the run "
        "(`cnn2gnn run` with its config makes one that stays)"
    )
    with tempfile.TemporaryDirectory(prefix="cnn2gnn-model-") as name:
        write_model(context, Path(name), thumbnails=0)
        yield Classifier.open(Path(name), device=device)


def context_of(run: Path, trained: Literal["student", "control"] = "student") -> Context:
    """The context of a finished run, with the fields that its student (or control) was trained with.

    Raises:
        UserError: the folder is not a run, or its student (control) is not trained.
    """  # noqa: DOC501
    from cnn2gnn_dist import settings

    file = run / "config.yaml"
    artefact.check_not_set_aside(run)
    if not run.is_dir():
        raise UserError(
            "there is no such folder" if not run.exists() else "this is not a folder",
            where=str(run),
            remedy="name the folder of a model, or of a finished run",
        )
    if not file.is_file():
        artefact.check_whole(run)
        raise unfinished(run, "it has no config.yaml", "run")
    try:
        config = settings.of_run(run)
    except UserError as error:
        if str(file) in error.where:  # not a config at all
            raise unfinished(run, "its config.yaml is damaged", "run") from None
        raise UserError(
            f"this run's config is from another version: {error.what}",
            where=f"{file}: {error.where}",
            remedy="use the version of cnn2gnn-dist that made the run, or repeat the run",
        ) from None
    root = Path(str(config.run.dir))
    if trained == "control" and not (root / "control" / "done.json").is_file():
        raise UserError(
            "this run has trained no control",
            where=str(run),
            remedy="run `cnn2gnn control` with the run's config and student.control=true, or export the "
            "student: leave out --control",
        )
    if trained == "student" and not (root / "student" / "done.json").is_file():
        raise unfinished(run, "its student is not trained", "run")
    if (
        trained == "student"
        and config.graph.scope == "dataset"
        and not list((root / "graph").glob("v????"))
    ):
        raise unfinished(run, "it has no graph", "graph")
    from cnn2gnn_dist.pipeline.keys import as_made
    from cnn2gnn_dist.pipeline.runner import choose_device
    from cnn2gnn_dist.runtime.ranks import Ranks
    from cnn2gnn_dist.stages.shared.context import Context, RunPaths

    config = as_made(config, root, trained)
    device = "cpu" if config.device == "cpu" else choose_device("auto")
    return Context(config, Ranks(), RunPaths(root), root, "", device, False)


def unfinished(run: Path, what: str, stage: str) -> UserError:
    """Return the error for a folder that is not a finished run."""
    return UserError(
        f"this folder is not a model or a finished run: {what}",
        where=str(run),
        remedy=f"run `cnn2gnn {stage}` with the run's config, or name another folder",
    )
