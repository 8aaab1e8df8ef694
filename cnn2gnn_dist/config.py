"""The typed config: every field of a run, its meaning, its default and its limits."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from cnn2gnn_dist import consistency
from cnn2gnn_dist.config_data import DataConfig as DataConfig
from cnn2gnn_dist.config_data import StreamConfig as StreamConfig
from cnn2gnn_dist.config_data import ViewsConfig as ViewsConfig
from cnn2gnn_dist.config_graph import GraphConfig as GraphConfig
from cnn2gnn_dist.config_section import PATH
from cnn2gnn_dist.config_section import Section as Section
from cnn2gnn_dist.config_training import TrainConfig as TrainConfig


class RunConfig(Section):
    """Where the run is stored and how many ranks it has."""

    dir: str | None = Field(
        None, description="folder of the run; default runs/<name>", json_schema_extra=PATH
    )
    storage: str | None = Field(
        None,
        description="URL (s3://bucket/folder, or any other that fsspec can write to) where the run is also stored: if "
        "run.dir is lost, the same command continues with an empty one, and hosts may have a run.dir each "
        "(docs/cluster.md); null: only run.dir",
    )
    log_steps: int = Field(10, ge=1, description="optimizer steps between lines of metrics")
    ranks: int = Field(2, ge=1, description="training processes (world size) that `cnn2gnn run` starts; "
                       "a launcher sets its own number")  # fmt: skip


class TeacherConfig(TrainConfig):
    """The teacher, a CNN trained under DeepSpeed."""

    epochs: int = Field(
        10,
        ge=0,
        description="passes over the training images; 0: the network of `weights` is used as is",
    )
    arch: str = Field("resnet18", description="whitened_cnn (args: widths), or any timm model name")
    args: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of timm's model"
    )
    head_lr: float = Field(
        1.0, ge=0, description="factor of the learning rate for the classifier, timm's last layer"
    )
    mixup: float = Field(
        0.0, ge=0, le=2, description="mixup of pairs of images: alpha of Beta(alpha, alpha); 0: off"
    )
    cutmix: float = Field(
        0.0, ge=0, le=2, description="cutmix, likewise; with mixup: either, half of the pairs each"
    )
    pretrained: bool = Field(False, description="start from timm's pretrained weights (downloads)")
    weights: str | None = Field(
        None, description="start from this local file (.safetensors, .pth)", json_schema_extra=PATH
    )


class TargetsConfig(Section):
    """The teacher's soft targets."""

    views: int = Field(
        1,
        ge=0,
        description="number V of augmented views to write; the student's epoch e uses view e mod V; "
        "0: write only the clean image, for all views of the student",
    )
    logits: str | None = Field(
        None,
        description="Parquet file of precomputed logits, columns key (or id) and logits, in place of a teacher; null: "
        "the teacher's (docs/recipe.md)",
        json_schema_extra=PATH,
    )
    top_k: int | None = Field(None, ge=1, description="classes kept per row; null: all")
    batch: int = Field(256, ge=1, description="images per forward pass")


class StudentConfig(TrainConfig):
    """The two-layer GNN on a small stem."""

    stem: str = Field(
        "resnet_tiny", description="conv3, resnet_tiny, whitened_cnn, or any timm model name"
    )
    stem_args: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the stem"
    )
    stem_lr: float = Field(
        1.0,
        ge=0,
        description="factor of the learning rate for the stem; 0: frozen, except for the norms' statistics",
    )
    weights: str | None = Field(
        None,
        description="start the stem of student and control from this local file (.safetensors, .pth)",
        json_schema_extra=PATH,
    )
    dim: int = Field(128, ge=2, description="D: width of the stem's features x")
    hidden: int = Field(128, ge=2, description="H: width of the GNN's hidden layer")
    label_dim: int = Field(32, ge=1, description="width of the label embedding on the last hop")
    distill_weight: float = Field(
        0.9, ge=0, le=1, description="lambda: weight of the soft-target loss"
    )
    temperature: float = Field(2.0, gt=0, description="T of the soft targets")
    self_loss: float = Field(
        0.5, ge=0, description="weight of the same loss on the self path alone"
    )
    neighbour_loss: float = Field(
        0.0,
        ge=0,
        description="weight of -log(share of p on same-class neighbors), which trains the graph head",
    )
    logit_adjust: float = Field(
        0.0,
        ge=0,
        description="tau of logit adjustment for long tails: in training tau * log(the class's share of the targets) "
        "is added to the logits, so that answers favor rare classes; 0: off",
    )
    control: bool = Field(
        True, description="also train the same stem with an MLP head and no graph"
    )


class EvaluateConfig(Section):
    """How models are evaluated on held-out images."""

    batch: int = Field(
        256,
        ge=1,
        description="images per forward pass of a rank, also when embedding a graph's bank",
    )
    flip: bool = Field(
        False,
        description="average the log-probabilities of each held-out image and its mirror image, for all models; an "
        "exported model answers from the image alone",
    )
    gallery: int = Field(
        24, ge=0, description="test images shown in the report with their neighbors"
    )
    timing_images: int = Field(
        256,
        ge=64,
        description="images timed for ms_per_image (batches of 64); a quarter of them for ms_alone (one by one)",
    )


class ModelConfig(Section):
    """What the exported model contains."""

    thumbnails: int | None = Field(
        None,
        ge=0,
        le=512,
        description="side of the stored thumbnails of training images, in pixels; 0: none; null: 64, none for more "
        "than 200,000 images",
    )


class ClusterConfig(Section):
    """How ranks run under Ray."""

    address: str | None = Field(
        None, description="Ray address of an existing cluster; null: start Ray here"
    )
    cpus_per_rank: float = Field(1.0, ge=0, description="CPUs reserved for each rank")
    grace_s: float = Field(
        2.5,
        ge=0,
        description="under `cnn2gnn run`: seconds that the ranks have to save when the driver gets SIGTERM "
        "(`ray job stop` allows it 3); under a launcher checkpoint.grace_s applies",
    )
    max_failures: int = Field(3, ge=0, description="how often the group of ranks is restarted")
    strategy: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        "PACK",
        description="ranks on as few nodes as possible, on as many as possible, or each on a separate node",
    )
    ranks_per_node: int | None = Field(
        None,
        ge=1,
        description="exactly this many ranks on each node; null: as cluster.strategy places them",
    )
    rank_resources: dict[str, float] = Field(
        default_factory=dict,
        description="custom Ray resources that a rank requires, such as {trainer: 1}: it runs only on nodes "
        "that were started with them",
    )
    reader_resources: dict[str, float] = Field(
        default_factory=dict,
        description="the same for a reader actor; readers are then spread over the nodes that have them, instead "
        "of running on their rank's node",
    )
    min_ranks: int | None = Field(
        None,
        ge=1,
        description="under Ray, if there is no room for all ranks: continue with fewer, but with at least this "
        "many; null: all or none",
    )
    timeout_s: float = Field(
        120.0, gt=0, description="seconds that a collective waits for a silent rank"
    )
    wait_s: float = Field(
        600.0,
        ge=0,
        description="under Ray, after a rank was lost: seconds to wait for its host to return, or for another",
    )


class CheckpointConfig(Section):
    """When checkpoints are saved and which are kept."""

    every_steps: int = Field(200, ge=1, description="optimizer steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="number of latest checkpoints to keep")
    keep_best: bool = Field(
        True, description="also keep the one with the best held-out accuracy so far"
    )
    max_failures: int = Field(
        5, ge=1, description="how many consecutive saves may fail before training stops"
    )
    grace_s: float = Field(
        25.0,
        gt=0,
        description="under a launcher: seconds that a rank has to finish its step and save after SIGTERM or "
        "SIGUSR1; under `cnn2gnn run` cluster.grace_s applies",
    )


class Config(Section):
    """All fields of a run."""

    name: str = Field(
        "demo", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", description="name of the run"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="seed of initial weights, order, views, sampling and splits"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if available")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of convolutions and matrix products; auto: bfloat16 where the device has it (GPUs; CPUs with "
        "AVX512-bf16 or AMX). Weights, distances and losses are float32 in any case",
    )
    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    views: ViewsConfig = Field(default_factory=ViewsConfig)
    stream: StreamConfig = Field(default_factory=StreamConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    targets: TargetsConfig = Field(default_factory=TargetsConfig)
    graph: GraphConfig = Field(default_factory=GraphConfig)
    student: StudentConfig = Field(default_factory=StudentConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _check(self) -> Config:
        consistency.check_batch_scope(self)
        consistency.check_teacher(self)
        consistency.check_sizes(self)
        consistency.check_resources(self)
        return self
