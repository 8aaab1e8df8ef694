"""The graph's sections of the config: search, partition, sampling."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cnn2gnn_dist import consistency
from cnn2gnn_dist.config_section import Section


class SearchConfig(Section):
    """How each image's candidates, its nearest training images, are found."""

    exact: bool = Field(
        True,
        description="exact nearest neighbors; false: coarse lists, then neighbors of neighbors",
    )
    recall: float = Field(
        0.95,
        gt=0,
        le=1,
        description="when not exact: recall@10 of a sample at which the search stops",
    )
    warm_start: bool = Field(
        True,
        description="when not exact: start a refresh from the previous neighbors; false: from scratch",
    )
    probes: int = Field(
        8,
        ge=1,
        description="when not exact: inverted lists (faiss IVF) that a live search probes",
    )


class PartitionConfig(Section):
    """How the graph is divided among ranks."""

    parts: int = Field(2, ge=1, description="partitions (DGL, METIS); at least as many as ranks")
    partitioner: Literal["metis", "streaming", "ranges"] = Field(
        "metis",
        description="metis: DGL's, few cut edges; streaming: restreamed Fennel, if METIS's memory "
        "(100 bytes per candidate) is not available; ranges: equal ranges of ids, bit-identical everywhere, "
        "the baseline of the cut",
    )
    repartition_cut: float = Field(
        1.5,
        ge=1,
        description="repartition from scratch when the share of cut edges has grown by this factor",
    )
    move_gain: int = Field(
        4,
        ge=1,
        description="at a refresh, move a node to another partition if at least this many edges stop crossing",
    )


class SamplingConfig(Section):
    """Which candidates a step sees: those of its seed nodes, and of their neighbors."""

    fanouts: tuple[int, int] = Field(
        (12, 8),
        strict=False,
        description="candidates of a seed node (k+1 or more for k weights, at least 2), and candidates sampled for "
        "each of them (at least 2; the nearest min(k, that - 1) of them have a weight)",
    )
    second_hop: Literal["sampled", "cached"] = Field(
        "cached",
        description="cached: the mean over all candidates of each neighbor, computed once per refresh; sampled: "
        "over fanouts[1] of them, drawn in each step",
    )
    sampler: Literal["table", "dgl", "distdgl"] = Field(
        "table",
        description="neighbor sampler. table: ours; dgl: DGL's; distdgl: DGL's servers hold graph and bank (trusted "
        "networks only, docs/distdgl.md)",
    )
    query: Literal["live", "table"] = Field(
        "live",
        description="a seed node's candidates. live: searched with its current z in the rank's partition; "
        "table: sampled from the table of the last refresh (queried with an augmented view)",
    )


class GraphConfig(Section):
    """The sparse graph learned from the images."""

    moved: ClassVar[dict[str, str]] = {
        name: f"{section}.{name}"
        for section, names in (
            ("search", "exact recall warm_start probes"),
            ("partition", "parts partitioner repartition_cut move_gain"),
            ("sampling", "fanouts second_hop sampler query"),
        )
        for name in names.split()
    }

    scope: Literal["dataset", "batch"] = Field(
        "dataset",
        description="dataset: neighbors from the bank of all training images; batch: within the batch, as in the paper",
    )
    dim: int = Field(
        64, ge=2, description="d: width of the projection z in which distances are measured"
    )
    candidates: int = Field(20, ge=2, description="M: nearest training images kept per node")
    neighbours: int = Field(10, ge=1, description="k: neighbors with a weight above zero, k < M")
    start_epoch: int = Field(
        2, ge=0, description="student epochs on the self path before the first graph"
    )
    warmup_epochs: float = Field(
        1.0,
        ge=0,
        description="epochs of linear warm-up of the graph's own parameters, from start_epoch on (scope dataset)",
    )
    gate_lr: float = Field(
        1.0,
        ge=0,
        description="factor of the learning rate for the gates of the neighbors' path, which start at 0: with "
        "student.optimizer=sgd they hardly open at 1",
    )
    refresh_epochs: int = Field(1, ge=1, description="epochs between builds of the graph")
    keep_versions: int = Field(2, ge=1, description="graph versions kept on disk")

    search: SearchConfig = Field(default_factory=SearchConfig)
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)

    @model_validator(mode="after")
    def _check(self) -> GraphConfig:
        consistency.check_graph(self)
        return self
