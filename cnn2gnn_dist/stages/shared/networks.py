"""The networks of a run, as configured: teacher, student, control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnn2gnn_dist import ledger
from cnn2gnn_dist.config import Config, TrainConfig
from cnn2gnn_dist.errors import UserError, first_line
from cnn2gnn_dist.models.normalise import Normalise
from cnn2gnn_dist.models.precision import MixedPrecision
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.models.student import Scope, Student
from cnn2gnn_dist.models.teacher import build_teacher
from cnn2gnn_dist.runtime.group import collectives, members
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder
from cnn2gnn_dist.training.checkpoint.folder import load_weights
from cnn2gnn_dist.training.sync_norm import synchronise_norms


class Teacher(MixedPrecision):
    """uint8 images [B, H, W, 3] → logits_BC: normalization, then the CNN.

    ``initial``: start from pretrained weights if the config names them.
    """

    def __init__(self, config: Config, num_classes: int, initial: bool = True) -> None:
        super().__init__()
        t = config.teacher
        self.normalise = Normalise(config.views.mean, config.views.std)
        self.cnn = build_teacher(
            t.arch,
            num_classes,
            config.views.size,
            pretrained=t.pretrained and initial,
            weights=t.weights if initial else None,
            args=dict(t.args),
        )

    def forward(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """Classify images."""
        with self.autocast(images_BHWC.device):
            logits_BC: torch.Tensor = self.cnn(self.normalise(images_BHWC))
        return logits_BC


def build_student(config: Config, num_classes: int, scope: Scope, initial: bool = True) -> Student:
    """Build the student of a config; ``scope="none"`` is the control: the same stem, an MLP head.

    ``initial``: start from the stem's pretrained weights if the config names them.
    """
    s = config.student
    return Student(
        build_stem(
            s.stem, s.dim, config.views.size, **(s.stem_args if initial else untrained_args(config))
        ),
        dim=s.dim,
        graph_dim=config.graph.dim,
        hidden=s.hidden,
        num_classes=num_classes,
        label_dim=s.label_dim,
        k=config.graph.neighbours,
        scope=scope,
        mean=config.views.mean,
        std=config.views.std,
    )


def untrained_args(config: Config) -> dict[str, Any]:
    """``student.stem_args`` without what names initial weights, which may not be there after training."""
    given = config.student.stem_args
    return {name: value for name, value in given.items() if name not in ("pretrained", "weights")}


@torch.no_grad()
def check_early_size(
    model: Teacher | Student, network: nn.Module, settings: TrainConfig, section: str
) -> None:
    """Check that a network accepts the smaller images of the first epochs.

    Raises:
        UserError: it doesn't: too little is left of them, or its input has a fixed size.
    """
    size = settings.early_size
    if size is None:
        return
    training = network.training
    try:
        network.eval()(model.normalise(torch.zeros(2, size, size, 3)))
    except Exception as error:  # timm's and torch's own, without a common type
        raise UserError(
            f"the network can't take images of {size} pixels: {first_line(error)}",
            where=f"{section}.early_size",
            remedy=f"larger images, or {section}.early_size=null",
        ) from error
    network.train(training)


def check_norms(config: Config) -> None:
    """Check that the norms of student and control can be synchronized across ranks.

    Raises:
        UserError: a layer of the stem is of another kind (``synchronise_norms``).
    """
    s = config.student
    synchronise_norms(build_stem(s.stem, s.dim, config.views.size, **untrained_args(config)))


def load_model(model: nn.Module, root: Path, stage: str) -> None:
    """Load the weights and buffers with which a finished stage of a run ended, without DeepSpeed.

    Raises:
        UserError: the stage is not finished, or that checkpoint is incomplete; no other is used
            instead, since whatever was built on the stage matches only that one.
    """
    model.load_state_dict(load_weights(final_checkpoint(root, stage)))


def final_checkpoint(root: Path, stage: str) -> Path:
    """Return the checkpoint that a finished training has recorded in ``done.json``, verified.

    Raises:
        UserError: the stage is not finished; that checkpoint is missing or corrupt.
    """
    path = checkpoint_folder.recorded(root / stage)
    if path is None:
        raise UserError(
            f"the stage {stage} is not finished",
            where=str(root / stage),
            remedy=f"run `cnn2gnn {stage}` first",
        )
    problem = checkpoint_folder.damage(path)
    if problem is not None:
        raise UserError(
            f"the final checkpoint of the stage {stage} is not complete: {problem}",
            where=str(path),
            remedy=f"`cnn2gnn {stage}` recreates it from the previous checkpoint",
        )
    return path


def check_built_on(root: Path, stage: str, need: str) -> None:
    """Check that a finished stage of a run was built on the current output of another one.

    Raises:
        UserError: the other stage has been rebuilt since.
    """
    entry, now = ledger.finished(root / stage), ledger.finished(root / need)
    if entry and now and entry.inputs.get(need, now.digest) != now.digest:
        raise UserError(
            f"the {stage} of this run was built from a different {need} than the current one",
            where=str(root / stage),
            remedy=f"`cnn2gnn {stage} --update` rebuilds it from the current one",
        )


def norms_of(stage_folder: Path) -> list[list[int]]:
    """[step, images] of a trained model: from which step on BatchNorm saw how many images at a time.

    More than one pair: training was resumed with other micro-batches or ranks. Empty without BatchNorm.
    """
    path = checkpoint_folder.recorded(stage_folder)
    return list(checkpoint_folder.read_state(path)["extra"].get("norms", [])) if path else []


def share_buffers(model: nn.Module) -> None:
    """Give all ranks rank 0's buffers (collective): DeepSpeed does so for parameters only.

    They differ where hosts have read different files of initial weights.
    """
    if members.on_several_hosts():
        values = collectives.broadcast_object([buffer.cpu() for buffer in model.buffers()])
        for buffer, value in zip(model.buffers(), values, strict=True):
            buffer.copy_(value)
