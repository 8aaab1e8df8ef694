"""The settings that the trainings of teacher and student have in common."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cnn2gnn_dist.config_section import Section


class TrainConfig(Section):
    """Training settings that teacher and student have in common."""

    epochs: int = Field(10, ge=1, description="passes over the training images")
    global_batch: int = Field(256, ge=1, description="samples per optimizer step, over all ranks")
    max_micro_batch: int = Field(
        256,
        ge=1,
        description="most samples that a rank holds at once; gradients of more are accumulated",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw",
        description="adamw, or sgd: with Nesterov's momentum, the weight decay added to the gradient",
    )
    momentum: float = Field(0.9, gt=0, lt=1, description="momentum of optimizer=sgd")
    bias_lr: float = Field(
        1.0, ge=0, description="factor of the learning rate for the biases of norms"
    )
    warmup_epochs: float = Field(1.0, ge=0, description="epochs of linear warm-up")
    weight_decay: float = Field(0.05, ge=0, description="weight decay (matrices only)")
    clip: float = Field(1.0, ge=0, description="gradient clipping: largest norm; 0: off")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="label smoothing of the cross-entropy"
    )
    eval_epochs: int = Field(
        0, ge=0, description="epochs between evaluations on held-out images; 0: only at the end"
    )
