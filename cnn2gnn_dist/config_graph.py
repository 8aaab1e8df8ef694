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
        description="exact nearest neighbours; false: coarse lists, then neighbours of neighbours",
    )
    recall: float = Field(
        0.95,
        gt=0,
        le=1,
        description="recall@10 of a sample at which the search ends when not exact",
    )
    warm_start: bool = Field(
        True,
        description="when not exact, start a refresh from the neighbours before; false: anew each time",
    )
    probes: int = Field(
        8,
        ge=1,
        description="inverted lists (faiss IVF) that a live search looks into when not exact",
    )


class PartitionConfig(Section):
    """How the graph is divided among ranks."""

    parts: int = Field(2, ge=1, description="partitions (DGL, METIS); at least as many as ranks")
    partitioner: Literal["metis", "streaming", "ranges"] = Field(
        "metis",
        description="metis: DGL's, few cut edges; streaming: restreamed Fennel, where METIS's memory "
        "(100 bytes a candidate) is not to be had; ranges: equal stretches of ids, repeatable to the bit everywhere, "
        "the baseline of the cut",
    )
    repartition_cut: float = Field(
        1.5, ge=1, description="partition anew when the share of cut edges has grown by this factor"
    )
    move_gain: int = Field(
        4,
        ge=1,
        description="at a refresh a node changes its part if at least so many edges stop crossing",
    )


class SamplingConfig(Section):
    """Which candidates a step sees: of its seeds, and of their neighbours."""

    fanouts: tuple[int, int] = Field(
        (12, 8),
        strict=False,
        description="candidates of a seed (k+1 or more for k weights, at least 2), and candidates sampled of "
        "each of them (at least 2; the nearest min(k, that - 1) of them have a weight)",
    )
    second_hop: Literal["sampled", "cached"] = Field(
        "sampled",
        description="sampled: fanouts[1] candidates of each neighbour; cached: all of them, averaged once a refresh",
    )
    sampler: Literal["table", "dgl", "distdgl"] = Field(
        "table",
        description="neighbour sampler: own; DGL's; distdgl: DGL's servers hold graph and bank (trusted networks "
        "only, docs/distdgl.md)",
    )
    query: Literal["live", "table"] = Field(
        "live", description="a seed's candidates: searched with its live z in the rank's partition, or sampled "
        "from the table of the last refresh (queried with an augmented view)",
    )  # fmt: skip


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
        description="dataset: neighbours from the bank of all training images; batch: the paper's",
    )
    dim: int = Field(
        64, ge=2, description="d: width of the projection z in which distances are taken"
    )
    candidates: int = Field(20, ge=2, description="M: nearest training images kept for each node")
    neighbours: int = Field(10, ge=1, description="k: neighbours with a weight above zero, k < M")
    start_epoch: int = Field(
        2, ge=0, description="student epochs on the self path before the first graph"
    )
    warmup_epochs: float = Field(
        1.0,
        ge=0,
        description="epochs of linear warm-up of the graph's own parameters from start_epoch on (scope dataset)",
    )
    refresh_epochs: int = Field(1, ge=1, description="epochs between two builds of the graph")
    keep_versions: int = Field(2, ge=1, description="graph versions left on disk")

    search: SearchConfig = Field(default_factory=SearchConfig)
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)

    @model_validator(mode="after")
    def _check(self) -> GraphConfig:
        consistency.check_graph(self)
        return self
