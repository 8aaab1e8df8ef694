"""Edits of a model's memory: images in, a new version out; new classes are scored by rule R.

Every function edits the current version on disk, and switches the model to the new one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.duplicates import row_keys
from cnn2gnn_dist.inference.audit import folder as audit_folder
from cnn2gnn_dist.inference.classifier import BATCH, Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.inference.memory import decisions, edits, thumbnails, turns
from cnn2gnn_dist.inference.memory.new_classes import NewClasses, Trade
from cnn2gnn_dist.inference.memory.old_classes import Images, OldClasses
from cnn2gnn_dist.inference.memory.set_apart import SetApart
from cnn2gnn_dist.inference.memory.store import NewRows, Version
from cnn2gnn_dist.inference.memory.subset import Subset
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.inference.network import Outputs, joined
from cnn2gnn_dist.inference.scoring import HeldOut
from cnn2gnn_dist.log import counted

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Added:
    """What adding images did.

    Attributes:
        version: the new version; None after a dry run, or before it is committed.
        class_name: as stored in the memory, without surrounding spaces.
        keys: of the images added.
        errors: (name, why) of images that could not be read.
        new_class: whether the class was not trained.
        learned: whether its column was learned, rather than taken from the mean of its images.
        old_before: accuracy on calibration images of the old classes without any new class, in %.
        trades: predicted accuracies of old and new classes for a range of losses; the one whose
            ``old_loss`` is below applies. Empty for a trained class.
        old_loss: points that the old classes may lose to new ones; None: there are no new ones.
        judged_on: number of images of one class that would tell as much about the new classes' accuracy as theirs do.
    """

    version: Version | None
    class_name: str
    keys: list[str]
    errors: list[tuple[str, str]] = field(default_factory=list)
    new_class: bool = False
    learned: bool = False
    old_before: float | None = None
    trades: tuple[Trade, ...] = ()
    old_loss: float | None = None
    judged_on: float = 0.0


def add(
    model: Classifier,
    images: Any,
    class_name: str,
    *,
    old_loss: float | None = None,
    dry_run: bool = False,
    wait_s: float = 10.0,
    tell: Callable[[Added], object] = lambda _: None,
) -> Added:
    """Add images of one class to the memory; the class may be new.

    Args:
        model: with a memory.
        images: as ``Classifier.predict`` takes them.
        class_name: of all of them.
        old_loss: points of accuracy that the old classes may lose to new ones; None: as many as
            when it was last said, else 1.
        dry_run: predict what it would do, and change nothing.
        wait_s: seconds to wait for another edit to finish.
        tell: given what will be done (``version`` is None) before it is committed, while no other edit is possible;
            if it raises an exception, nothing is changed.

    Raises:
        UserError: no memory; no image can be read; an image or its key already exists; a new class, but
            the model has no calibration images. Nothing was changed.
    """
    root = model.required_memory().root
    _check(model)  # before images are decoded, and once more before anything is changed
    good, errors = _decoded(model, images)
    with turns.editing(root, wait_s):
        _check(model)
        edit = edits.Edit(root)
        made = _outputs(model, good, edit.before)
        label = edit.class_index(class_name, new=True)
        rows = _rows(good, made, label, edit.before)
        edit.add(rows)
        fitted = _score_new_classes(model, edit, old_loss)
        entry = edit.classes[label]
        planned = Added(
            version=None,
            class_name=entry.name,
            keys=list(rows.keys),
            errors=errors,
            new_class=not entry.trained,
            learned=fitted is not None and not entry.trained and fitted.is_learned(entry.name),
            old_before=fitted.old_before if fitted else None,
            trades=fitted.trades if fitted and not entry.trained else (),
            old_loss=fitted.old_loss if fitted else None,
            judged_on=fitted.judged_on if fitted else 0.0,
        )
        tell(planned)
        action = f"add {counted(len(good), 'image')} of '{entry.name}'"
        done = planned if dry_run else replace(planned, version=edit.commit(action))
    model.reload()
    return done


def remove(model: Classifier, keys: Sequence[str], *, wait_s: float = 10.0) -> Version:
    """Remove images by their keys.

    Raises:
        UserError: no memory; an unknown key; nothing was changed.
    """
    return _edited(
        model,
        lambda edit: edit.remove(edit.rows_of(keys)),
        f"remove {counted(len(set(keys)), 'image')}",
        wait_s,
    )


def relabel(
    model: Classifier, keys: Sequence[str], class_name: str, *, wait_s: float = 10.0
) -> Version:
    """Give images another class of the memory.

    Raises:
        UserError: no memory; an unknown key or class; nothing was changed.
    """

    def change(edit: edits.Edit) -> None:
        edit.relabel(edit.rows_of(keys), edit.class_index(class_name, new=False))

    action = f"relabel {counted(len(set(keys)), 'image')} to '{class_name}'"
    return _edited(model, change, action, wait_s)


def forget(model: Classifier, keys: Sequence[str], *, wait_s: float = 10.0) -> Version:
    """Remove images and everything stored about them, in earlier versions too.

    They may be in the memory, or set apart for calibration. It can't undo that the network's weights, the teacher's
    soft targets and the constants of the calibration were learned from them.

    Raises:
        UserError: no memory; an unknown key; nothing was changed. Or an audit of the model can't be deleted: the images
            are listed as forgotten, but remain in the memory.
    """
    version = edits.forget(
        model.required_memory().root,
        keys,
        score=lambda edit: _score_new_classes(model, edit, without=keys),
        apart=SetApart(model.folder),
        elsewhere=lambda: _forget_in_audit(model, set(keys)),
        wait_s=wait_s,
        check=lambda: _check(model),
    )
    model.reload()
    return version


def _forget_in_audit(model: Classifier, keys: Collection[str]) -> None:
    folder, listed = model.folder / artefact.AUDIT, decisions.listed(model.required_memory().root)
    names = {*keys, *(name for name, _, key in listed if key in keys)}
    try:
        if audit_folder.forget(folder, names):
            _log.info(f"the audit in {folder} showed these images, and is deleted")
    except (OSError, ValueError) as error:
        raise UserError(
            f"the audit of the model, which shows these images, can't be deleted: {error}; they are listed as "
            "forgotten, but still in the memory",
            where=str(folder),
            remedy="delete this folder, and run the command again",
        ) from None


def undo(model: Classifier) -> Version:
    """Return to the version before the current one.

    Raises:
        UserError: no memory; no earlier version.
    """
    version = edits.undo(model.required_memory().root, lambda: _check(model))
    model.reload()
    return version


def compact(model: Classifier) -> Version:
    """Write the remaining images as one segment, and delete all earlier versions.

    Raises:
        UserError: no memory; the disk is full; nothing was changed.
    """
    version = edits.compact(model.required_memory().root, lambda: _check(model))
    model.reload()
    return version


def _edited(model: Classifier, change: Any, action: str, wait_s: float) -> Version:
    root = model.required_memory().root
    with turns.editing(root, wait_s):
        _check(model)
        edit = edits.Edit(root)
        change(edit)
        _score_new_classes(model, edit)
        version = edit.commit(action)
    model.reload()
    return version


def _check(model: Classifier) -> None:
    """Check that the folder still holds this model: features of another network must not get into its memory.

    While an edit waits for its turn, ``export --force`` or ``run --update`` may put a new model there.

    Raises:
        UserError: the folder holds another model by now.
    """
    artefact.check_unchanged(model.folder, model.identity)


def _outputs(model: Classifier, images: list[Pixels], memory: Memory) -> Outputs:
    starts = range(0, len(images), BATCH)
    return joined([model.outputs(images[at : at + BATCH], memory) for at in starts])


def _decoded(model: Classifier, images: Any) -> tuple[list[Pixels], list[tuple[str, str]]]:
    """The images that can be read, and name and error of the others.

    Raises:
        UserError: none can be read.
    """
    decoded = [one for many in model.batches(images, BATCH) for one in many]
    errors = [(one.name, one.error) for one in decoded if one.error is not None]
    good = [one for one in decoded if one.pixels is not None]
    if not good:
        raise UserError(
            f"none of these {len(decoded)} images can be read"
            + (f": {errors[0][1]}" if errors else ""),
            where=decoded[0].name if decoded else "",
            remedy="name image files, or folders that contain images; nothing was changed",
        )
    return good, errors


def _rows(images: list[Pixels], made: Outputs, label: int, memory: Memory) -> NewRows:
    side = thumbnails.side_of(memory)
    pictures = [
        thumbnails.thumbnail(one.pixels, side) if side and one.pixels is not None else None
        for one in images
    ]
    return NewRows(
        x=made.x.astype(np.float16),
        z=made.z,
        labels=np.full(len(images), label, np.int32),
        candidates=None,
        keys=_keys(images),
        sources=[one.name for one in images],
        thumbnails=pictures,
    )


def _keys(images: list[Pixels]) -> list[str]:
    """File names, or full paths if two files have the same name; a digest if there is no name."""
    names = [one.name if one.named else _digest(one) for one in images]
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else names


def _digest(one: Pixels) -> str:
    assert one.pixels is not None
    return f"image-{hashlib.sha256(one.pixels.tobytes()).hexdigest()[:16]}"


def _score_new_classes(
    model: Classifier,
    edit: edits.Edit,
    old_loss: float | None = None,
    without: Collection[str] = (),
) -> NewClasses | None:
    """Fit rule R to the new classes after an edit; without any the head is as trained.

    Images set apart are answered anew too, among the rows after the edit: with other images of their classes, or fewer,
    the head is right more or less often than at the export.
    It depends on the set of images alone, not on how it was reached: logits are computed anew, and rows come in the
    order of their contents, so that even sums have the same bits.
    """
    new_ids = np.flatnonzero(edit.live & (edit.labels >= edit.trained))
    if not len(new_ids):
        edit.heads = {}
        return None
    temperature = model.scoring.calibrated().temperature
    held_out = HeldOut.read(model.folder, without)
    assert held_out is not None
    _refuse_without(held_out, edit, new_ids)
    before, after = (Subset(edit, trained_only=only) for only in (True, False))
    alone_nC = held_out.logits_with(model.network, before, before.nearest)
    images = Images(held_out.logits_with(model.network, after, after.nearest), held_out.images.x_nD)
    new_ids = _by_content(edit, new_ids)
    logits, x = _logits(model, edit, new_ids), edit.x(new_ids).astype(np.float32)
    labels = edit.labels[new_ids]
    named = sorted((edit.classes[label].name, label) for label in np.unique(labels).tolist())
    entries = {name: Images(logits[labels == label], x[labels == label]) for name, label in named}
    known = np.flatnonzero(edit.live & (edit.labels < edit.trained))  # those being added, too
    known = _by_content(edit, known)
    known_x = edit.x(known).astype(np.float32)
    old = OldClasses.fit(
        known_x, edit.labels[known], images, held_out.labels_n, temperature=temperature,
    )  # fmt: skip
    loss = old_loss if old_loss is not None else edit.heads.get("new", {}).get("old_loss", 1.0)
    fitted = NewClasses.fit(
        old,
        entries,
        images,
        held_out.labels_n,
        alone_nC=alone_nC,
        old_loss=loss,
        replay=Images(_self_logits(model, known_x), known_x),
    )
    _warn_of_losses(model, fitted.lost(old, images, held_out.labels_n), loss)
    _warn_of_neighbours(fitted)
    edit.heads = {"old": old.to_json(), "new": fitted.to_json()}
    return fitted


def _refuse_without(held_out: HeldOut, edit: edits.Edit, new_ids: np.ndarray) -> None:
    if len(held_out.labels_n):
        return
    names = [edit.classes[label].name for label in np.unique(edit.labels[new_ids]).tolist()]
    raise UserError(
        f"without any image set apart for calibration the new classes can't be scored: {', '.join(names)}",
        where=str(edit.root),
        remedy="first remove all images of these classes, in one command; or keep some images set apart; nothing was "
        "changed",
    )


def _warn_of_losses(model: Classifier, lost: Iterable[tuple[int, int, int]], most: float) -> None:
    """Name old classes that new ones take over, from ``NewClasses.lost``; ``most``: points that all may lose."""
    for label, gone, right in lost:
        _log.warning(
            f"{model.spec.label_names[label]}: new classes take {gone} of the {right} calibration images that were "
            f"answered right, although all old classes together lose at most {most:g} points; a smaller "
            "--old-loss keeps more of it"
        )


def _warn_of_neighbours(fitted: NewClasses) -> None:
    """Say if no offset keeps the loss within its limit: new images, as neighbors, change the head's answers too."""
    kept = next(one.old for one in fitted.trades if one.old_loss == fitted.old_loss)
    if (lost := fitted.old_before - kept) > fitted.old_loss + 1e-6:
        _log.warning(
            f"old classes lose {lost:.1f} points on the calibration images, more than the {fitted.old_loss:g} allowed: "
            "images of new classes are near theirs, and change what the network answers; add fewer of them, or none "
            "that look like an old class"
        )


def _by_content(edit: edits.Edit, ids: np.ndarray) -> np.ndarray:
    """Rows in the order of a hash of their x."""
    return ids[np.argsort(row_keys(edit.x(ids)), kind="stable")]


def _logits(model: Classifier, edit: edits.Edit, ids: np.ndarray) -> np.ndarray:
    """Logits of rows after an edit, each as if it were not in the memory."""
    near = edit.nearest_others(ids, model.spec.graph.fanout).astype(np.int64)
    starts = range(0, len(ids), BATCH)
    return np.concatenate(
        [
            model.network.row_logits(edit, ids[at : at + BATCH], near[at : at + BATCH])
            for at in starts
        ]
    )


@torch.inference_mode()
def _self_logits(model: Classifier, x_ND: np.ndarray) -> np.ndarray:
    """Logits of the self path, from stored features."""
    x = torch.from_numpy(np.ascontiguousarray(x_ND, np.float32)).to(model.network.device)
    found: np.ndarray = model.network.student.gnn(x)[1].float().cpu().numpy()
    return found
