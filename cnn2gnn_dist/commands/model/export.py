"""``cnn2gnn export``: write a finished run's model to a separate folder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cnn2gnn_dist import durable, ledger
from cnn2gnn_dist.commands.model.opening import context_of, opened
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.copying import LEFT_OUT, copy_model
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.folder.run_model import model_of_run
from cnn2gnn_dist.inference.memory import store, turns
from cnn2gnn_dist.inference.memory.forgetting import keys_there, record_forgotten
from cnn2gnn_dist.inference.memory.rewriting import classes_by_key, edits_of
from cnn2gnn_dist.inference.memory.set_apart import SetApart
from cnn2gnn_dist.inference.memory.view import forgotten
from cnn2gnn_dist.inference.scoring import REMEDY
from cnn2gnn_dist.log import output, quoted

_log = logging.getLogger(__name__)


def command(run: Path, target: Path, *, force: bool = False, control: bool = False) -> int:
    """Write a run's model to a separate folder, and print how to use it.

    Images that a replaced model has forgotten are left out; its other edits are named.

    Args:
        run: folder of a finished run, or a model's folder (to copy it).
        target: folder to write; it appears once it is complete.
        force: replace an existing model.
        control: the run's control instead of its student.

    Raises:
        UserError: the run is not finished, or has no control; the target exists; the disk is full.
    """
    try:
        _put_back(target)  # an earlier attempt may have been killed between its two renames
        _check_target(run, target, force)
    except OSError as error:
        raise UserError(
            f"this folder can't be read: {error.strerror}",
            where=str(target),
            remedy="name a folder inside one that you can write to",
        ) from None
    is_model = (run / artefact.CONFIG).is_file()
    if control and is_model:
        raise UserError(
            "this is one model, without its run's control",
            where=str(run),
            remedy="name the folder of the run, or leave out --control",
        )
    if not is_model:  # refused before anything is created
        context_of(run, "control" if control else "student")
    durable.create_folder(target.parent)
    temporary, aside = target.with_name(f".{target.name}.tmp"), artefact.aside_of(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with durable.disk_full_reported(target):
            left_out = forgotten(target / artefact.MEMORY)
            _write(run, temporary, control, left_out)
        made = Classifier.open(temporary, device="cpu", verify=True)
        if made.scoring.is_earlier:
            _log.warning(
                f"images answered together: this model has an earlier rule; {REMEDY}; then export it again"
            )
        with turns.editing_if_there(target / artefact.MEMORY):
            if late := set(forgotten(target / artefact.MEMORY)).difference(left_out):
                _forget(temporary, sorted(late))  # while the new model was being written
            if target.exists():
                _warn_of_edits(target, made)
                shutil.rmtree(aside, ignore_errors=True)  # left behind by a killed attempt
                os.replace(target, aside)
            os.replace(temporary, target)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(target)
        raise
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    output(f"model    {target} ({size / 1e6:,.1f} MB)")
    output(f"predict  cnn2gnn predict --model {quoted(target)} IMAGE…")
    return 0


def _put_back(target: Path) -> None:
    """Return a model that was set aside for a new one, if that one has not taken its place."""
    if (aside := artefact.replaced_by_none(target)) is not None:
        os.replace(aside, target)


def onnx(model: Path, target: Path) -> int:
    """Write a model as ONNX graphs and arrays (``inference/export/onnx_export.py``).

    Raises:
        UserError: not a model; the scope is batch; the target exists or can't be written; the disk is full.
    """
    from cnn2gnn_dist.inference.export.onnx_export import export

    with opened(model, "cpu") as classifier:
        export(classifier, target)
    how = "an example that answers from it: examples/onnx_predict.py"
    if not (target / "head.onnx").exists():
        how = "the model has no memory: self_logits of encoder.onnx are its logits"
    output(f"onnx     {target}; {how}")
    return 0


def programs(model: Path, target: Path) -> int:
    """Write a model as programs of ``torch.export`` and arrays (``inference/export/torch_export.py``).

    Raises:
        UserError: not a model; the scope is batch; the target exists or can't be written; the disk is full.
    """
    from cnn2gnn_dist.inference.export.torch_export import export

    with opened(model, "cpu") as classifier:
        export(classifier, target)
    output(f'programs {target}: torch.export.load("{target}/encoder.pt2").module()')
    return 0


def _warn_of_edits(target: Path, made: Classifier) -> None:
    """Say what edits of the memory that is replaced are not in the new one."""
    new = {} if made.memory is None else classes_by_key(made.memory)
    if edits := edits_of(target / artefact.MEMORY, new):
        _log.warning(
            f"the memory in {target} was edited; in comparison with the new one it had {edits}"
        )


def _write(run: Path, temporary: Path, control: bool, left_out: Sequence[str]) -> None:
    """Write the model without the images that the one in its place had forgotten."""
    source = run if (run / artefact.CONFIG).is_file() else None
    if source is None:
        context = context_of(run, "control" if control else "student")
        source = None if control else model_of_run(run)
    if source is None:
        from cnn2gnn_dist.stages.model import write_model

        write_model(context, temporary, control=control, forgotten=left_out)
        return
    artefact.read_config(source)
    artefact.check_files(source)
    copy_model(source, temporary, (*LEFT_OUT, ledger.HELD))
    if left_out:
        _forget(temporary, left_out)


def _forget(folder: Path, keys: Sequence[str]) -> None:
    memory, apart = folder / artefact.MEMORY, SetApart(folder)
    known = sorted(keys_there(memory, apart, keys))
    memory.mkdir(exist_ok=True)
    # First, so that the list is in the order of the replaced model's.
    record_forgotten(memory, keys)
    if known and (memory / store.HEAD).is_file():
        _log.info(f"{len(known):,} images that the replaced model has forgotten are left out")
        editing.forget(Classifier.open(folder, device="cpu"), known)
    elif known:
        apart.forget(known)


def _check_target(run: Path, target: Path, force: bool) -> None:
    if run.resolve() in target.resolve().parents and (run / artefact.CONFIG).is_file():
        raise UserError(
            "the target is inside the model itself",
            where=str(target),
            remedy="name a folder outside",
        )
    if not target.exists():
        return
    is_model = (target / artefact.CONFIG).is_file() and (target / artefact.CHECKSUMS).is_file()
    empty = target.is_dir() and not any(target.iterdir())
    if not (empty or (is_model and force)):
        raise UserError(
            "a model already exists here" if is_model else "something else already exists here",
            where=str(target),
            remedy="--force replaces it" if is_model else "name a folder that does not exist",
        )
