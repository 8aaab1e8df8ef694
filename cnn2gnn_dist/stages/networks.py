"""The networks of a run, as its config says: teacher, student, control."""

from __future__ import annotations

import torch
from torch import nn

from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.normalise import Normalise
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.models.student import Scope, Student
from cnn2gnn_dist.models.teacher import build_teacher
from cnn2gnn_dist.training.checkpoint import Checkpoints
from cnn2gnn_dist.training.checkpoint_folder import load_weights


class Teacher(nn.Module):
    """uint8 images [B, H, W, 3] → logits_BC: normalisation, then the CNN.

    ``initial``: start from pretrained weights where the config names them.
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
        """Classify."""
        return self.cnn(self.normalise(images_BHWC))


def build_student(config: Config, num_classes: int, scope: Scope) -> Student:
    """The student of a config; ``scope="none"`` is the control: the same stem, an MLP head."""
    s = config.student
    return Student(
        build_stem(s.stem, s.dim, config.views.size, **s.stem_args),
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


def load_model(model: nn.Module, checkpoints: Checkpoints, stage: str) -> None:
    """Weights and buffers of a stage's newest whole checkpoint, without DeepSpeed.

    Raises:
        UserError: there is none.
    """
    latest = checkpoints.latest()
    if latest is None:
        raise UserError(
            f"the stage {stage} has left no whole checkpoint",
            where=str(checkpoints.folder),
            remedy=f"run `cnn2gnn {stage}` first",
        )
    model.load_state_dict(load_weights(latest))
