"""Checks that ranks and images fit the config, made before the first training instead of hours into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.batch_sizes import check_parts
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.stages.shared.networks import check_norms
from cnn2gnn_dist.training import ds_config
from cnn2gnn_dist.training.accumulation import accumulation_for

_TRAINS = ("teacher", "student", "control")


def check(
    config: Config,
    stages: Iterable[str],
    world_size: int,
    deepspeed: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Check that batches and partitions fit the ranks, and that the stem's norms can be synchronized.

    Args:
        config: of the run.
        stages: names of the stages still to run; complete stages may have had other ranks.
        world_size: number of ranks.
        deepspeed: the DeepSpeed configs of "teacher" and "student", as read; None: they are not checked.

    Raises:
        UserError: they don't, or the DeepSpeed config of a later stage would be refused when it begins.
    """
    ahead = set(stages).intersection(_TRAINS)
    if world_size > 1 and ahead.intersection(("student", "control")):
        check_norms(config)
    for name in ahead:
        section = "teacher" if name == "teacher" else "student"
        settings = getattr(config, section)
        accumulation = accumulation_for(
            settings.global_batch,
            world_size,
            settings.max_micro_batch,
            f"{section}.global_batch",
        )
        if section == "student" and settings.global_batch == accumulation:  # so there is one rank
            raise UserError(
                f"a global batch of {settings.global_batch} on one rank gives micro-batches of one image, of which "
                "BatchNorm has no statistics",
                where="student.global_batch, student.max_micro_batch",
                remedy=f"student.global_batch={_even(settings.global_batch)}, student.max_micro_batch="
                f"{max(settings.max_micro_batch, 2)}",
            )
        if deepspeed is not None and section in deepspeed:
            device = "cuda" if config.device == "cuda" else "cpu"
            resolve_deepspeed(config, section, deepspeed[section], world_size, accumulation, device)
        if name == "student" and config.graph.scope == "batch":
            _check_pool(config, world_size, accumulation)
        if name == "student" and config.graph.scope == "dataset":
            check_parts(config.graph.partition.parts, world_size, settings.global_batch)
            if (
                config.graph.sampling.sampler == "distdgl"
                and config.graph.partition.parts != world_size
            ):
                raise UserError(
                    f"{config.graph.partition.parts} partitions for {world_size} ranks: with DGL's servers "
                    "each rank serves one",
                    where="graph.partition.parts",
                    remedy=f"graph.partition.parts={world_size}, or graph.sampling.sampler=table",
                )


def _check_pool(config: Config, world_size: int, accumulation: int) -> None:
    """Check that a micro-batch holds enough candidates, where it is the graph (``graph.scope=batch``).

    ``consistency.check_batch_scope`` knows neither the ranks nor what divides evenly.

    Raises:
        UserError: it doesn't.
    """
    student, least = config.student, config.graph.neighbours + 2
    share = student.global_batch // world_size
    rows = share // accumulation
    if rows >= least:
        return
    enough = next((n for n in range(least, share + 1) if share % n == 0), None)
    fix = f"student.max_micro_batch={enough}"
    if enough is None:
        fix = f"student.global_batch={least * world_size}"
    raise UserError(
        "with graph.scope=batch the images of a micro-batch are each other's candidates: a global batch of "
        f"{student.global_batch} over {world_size} ranks is {accumulation} of {rows} per rank, too few for "
        f"k={config.graph.neighbours} neighbors",
        where="student.global_batch, student.max_micro_batch",
        remedy=fix + (f", or graph.neighbours={rows - 2}" if rows > 2 else ""),
    )


def _even(batch: int) -> int:
    return batch + batch % 2


def resolve_deepspeed(
    config: Config,
    section: str,
    read: dict[str, Any],
    world_size: int,
    accumulation: int,
    device: str,
) -> dict[str, Any]:
    """``ds_config.resolve_for`` for the training of a section, whose errors name the file.

    Raises:
        UserError: the file would be refused when training begins.
    """
    settings = getattr(config, section)
    try:
        return ds_config.resolve_for(
            read, settings, world_size, accumulation, device, precision=config.precision
        )
    except UserError as error:
        file = settings.ds_config or "ds_config.json"
        raise UserError(error.what, where=f"{file}: {error.where}", remedy=error.remedy) from None


def check_images(
    config: Config, stages: Iterable[str], images: int, labelled: int | None = None
) -> None:
    """Check that there are enough training images for the stages still to run.

    ``labelled``: how many of them have a label, and so are neighbors; None: all.

    Raises:
        UserError: fewer than a global batch, or than a node's candidates in the graph; a training of one step, whose
            learning rate is 0.
    """
    for wrong in misfits(config, stages, images, labelled):
        raise wrong


def misfits(
    config: Config, stages: Iterable[str], images: int, labelled: int | None = None
) -> list[UserError]:
    """Errors for everything that needs more than ``images`` training images, in the order of the stages.

    ``labelled``: how many of them have a label, and so are neighbors; None: all.
    """
    ahead, found = set(stages), []
    for name in _TRAINS:
        section = "teacher" if name == "teacher" else "student"
        settings = getattr(config, section)
        batch = settings.global_batch
        seen, kind = images, "training"
        if name == "teacher" and labelled is not None and labelled < images:
            seen, kind = labelled, "labeled training"
        if name in ahead and settings.epochs and batch > seen:
            found.append(
                UserError(
                    f"{seen} {kind} images are fewer than one global batch of {batch}",
                    where=f"{section}.global_batch",
                    remedy=f"{section}.global_batch={seen} or less, or more images",
                )
            )
        elif (
            name in ahead
            and settings.schedule == "cosine"
            and settings.epochs * (seen // batch) == 1
        ):
            found.append(_one_step(section, name, seen, batch))
    graph, nodes = config.graph, images if labelled is None else labelled
    built = graph.scope == "dataset" and ahead.intersection(("student", "graph"))
    if built and graph.candidates >= nodes:
        fewer = f"graph.candidates={nodes - 1} or less, with graph.neighbours below it"
        kind = "training" if nodes == images else "labeled training"
        found.append(
            UserError(
                f"{graph.candidates} candidates for each of {nodes} {kind} images: there are "
                f"only {max(nodes - 1, 0)} others",
                where="graph.candidates",
                remedy=fewer if nodes > 2 else "more images",
            )
        )
    by_table = graph.scope == "dataset" and graph.sampling.query == "table"
    if by_table and "student" in ahead and nodes < images:
        found.append(
            UserError(
                f"{images - nodes} training images have no label, and so no row in the table of candidates: "
                "they would never have neighbors in training, but have them in tests",
                where="graph.sampling.query",
                remedy="graph.sampling.query=live, with graph.sampling.sampler=table or dgl",
            )
        )
    return found


def _one_step(section: str, name: str, images: int, batch: int) -> UserError:
    """The error for a training whose only step is its schedule's last."""
    fewer = f"{section}.global_batch={images // 2} or less, " if images > 3 else ""
    return UserError(
        f"{images} images in one epoch are one step of {batch}: {section}.schedule=cosine ends at a learning rate of "
        f"0, which is that of its last step, so the {name} would learn nothing",
        where=f"{section}.epochs",
        remedy=f"{section}.epochs=2 or more, {fewer}or {section}.schedule=triangular",
    )


def check_classes(train_N: np.ndarray, held_out: int, holdout: float | None) -> list[str]:
    """Check that there is something to learn and something to evaluate on.

    Args:
        train_N: labels of the training images.
        held_out: number of held-out images.
        holdout: the fraction that was to be held out; None: they are a separate data set.

    Returns:
        Warnings about what is unusual but may be intended, one sentence each.

    Raises:
        UserError: no held-out images; images of one class only.
    """
    classes, count_C = np.unique(train_N[train_N >= 0], return_counts=True)
    if not held_out:
        raise UserError(
            "there are no held-out images: every class has one image, which is needed for training"
            if holdout and count_C.max(initial=0) <= 1
            else "there are no held-out images to evaluate on",
            where="data.test",
            remedy="give a set of held-out images: data.test=…"
            + ("" if holdout else "; or set data.holdout above 0")
            + ("; or add images, at least two of each class" if holdout else ""),
        )
    if len(classes) < 2:
        raise UserError(
            f"all {len(train_N)} training images are of one class: there is nothing to learn",
            where="data.train",
            remedy="give images of at least two classes; a folder of images has a subfolder per class",
        )
    said = []
    single = int((count_C == 1).sum())
    if single == len(classes):
        said.append("every class has a single training image: no image has a neighbor of its class")
    elif single:
        said.append(f"{single} of {len(classes)} classes have a single training image")
    return said
