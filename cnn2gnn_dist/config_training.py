"""Training settings shared by teacher and student."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cnn2gnn_dist.config_section import PATH, Section


class TrainConfig(Section):
    """Training settings shared by teacher and student."""

    epochs: int = Field(10, ge=1, description="passes over the training images")
    early_size: int | None = Field(
        None,
        ge=8,
        description="side to which images are shrunk in the first epochs, in pixels; null: views.size throughout",
    )
    early_share: float = Field(
        0.6, gt=0, le=1, description="share of the epochs with images of early_size"
    )
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
    schedule: Literal["cosine", "triangular", "one_cycle"] = Field(
        "cosine",
        description="learning rate over training. cosine: linear warm-up, then half a cosine to 0; triangular: a line "
        "up and a line down; one_cycle: the same with half cosines, as torch's OneCycleLR",
    )
    lr_start: float | None = Field(
        None,
        ge=0,
        le=1,
        description="rate at the start as a share of lr (triangular, one_cycle); null: 0.2, 0.04",
    )
    lr_peak_at: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="where the peak is as a share of training (triangular, one_cycle); null: 0.23, 0.3",
    )
    lr_final: float | None = Field(
        None,
        ge=0,
        le=1,
        description="rate at the end as a share of lr (triangular, one_cycle); null: 0.07, 4e-6",
    )
    warmup_epochs: float = Field(1.0, ge=0, description="epochs of linear warm-up (cosine)")
    weight_decay: float = Field(0.05, ge=0, description="weight decay (matrices only)")
    clip: float = Field(1.0, ge=0, description="gradient clipping: largest norm; 0: off")
    average: Literal["none", "ema", "lookahead"] = Field(
        "none",
        description="average of weights over steps, which answers come from. ema: follows the weights; lookahead: also "
        "sets them to it",
    )
    average_decay: float = Field(
        0.99, ge=0, lt=1, description="share of the average that is kept per step"
    )
    average_every: int = Field(
        5, ge=1, description="steps between updates of the average, which then keeps decay^every"
    )
    average_ramp: float = Field(
        0.0,
        ge=0,
        description="that share is multiplied by (share of training done)^this; 0: constant",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="label smoothing of the cross-entropy"
    )
    eval_epochs: int = Field(
        0, ge=0, description="epochs between evaluations on held-out images; 0: only at the end"
    )
    ds_config: str | None = Field(
        None,
        description="DeepSpeed config; null: ./ds_config.json or the packaged one",
        json_schema_extra=PATH,
    )
    zero_stage: int | None = Field(
        None, ge=0, le=3, description="overrides the ZeRO stage of ds_config"
    )
