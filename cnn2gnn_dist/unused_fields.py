"""Fields that are set but have no effect, because of another field or the machine.

A field counts as set where it is not at its default: a config does not record which fields a user wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnn2gnn_dist.config import Config, TrainConfig

DOWNLOADED = ("cifar10", "cifar100")


@dataclass(frozen=True)
class Surroundings:
    """What a config can't know.

    Attributes:
        on_gpu: whether tensors lie on a GPU.
        inside_ray: whether the ranks run under Ray or under a launcher; None: not known yet.
        ranks: how many there are; None: not known yet.
        deepspeed: the DeepSpeed configs of "teacher" and "student".
    """

    on_gpu: bool = False
    inside_ray: bool | None = None
    ranks: int | None = None
    deepspeed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rule:
    """These fields have no effect where ``when`` holds, for the reason ``why``."""

    fields: tuple[str, ...]
    why: str
    when: Callable[[Config, Surroundings], bool]


def _training_rules(section: str) -> tuple[_Rule, ...]:
    """Rules for the training settings shared by "teacher" and "student"."""

    def of(config: Config) -> TrainConfig:
        found: TrainConfig = getattr(config, section)
        return found

    def clips(a: Surroundings) -> bool:
        return bool(a.deepspeed.get(section, {}).get("gradient_clipping", "auto") != "auto")

    def rule(names: str, why: str, when: Callable[[Config, Surroundings], bool]) -> _Rule:
        return _Rule(tuple(f"{section}.{name}" for name in names.split()), why, when)

    return (
        rule(
            "momentum",
            f"only {section}.optimizer=sgd uses it",
            lambda c, a: of(c).optimizer != "sgd",
        ),
        rule(
            "clip",
            "the DeepSpeed config sets its own gradient_clipping",
            lambda c, a: clips(a),
        ),
        rule(
            "lr_start lr_peak_at lr_final",
            f"{section}.schedule=cosine goes from 0 to its peak and to 0",
            lambda c, a: of(c).schedule == "cosine",
        ),
        rule(
            "warmup_epochs",
            f"only {section}.schedule=cosine has a warm-up",
            lambda c, a: of(c).schedule != "cosine",
        ),
        rule(
            "average_decay average_every average_ramp",
            f"{section}.average=none has no average",
            lambda c, a: of(c).average == "none",
        ),
        rule(
            "early_share",
            f"{section}.early_size=null has no early size",
            lambda c, a: of(c).early_size is None,
        ),
    )


_RULES = (
    # Choice of images.
    _Rule(
        ("data.shard_size", "data.image_column", "data.label_column"),
        "data.source=shards packs nothing",
        lambda c, a: c.data.source == "shards",
    ),
    _Rule(
        ("data.image_column", "data.label_column"),
        "only data.source=parquet has columns",
        lambda c, a: c.data.source != "parquet",
    ),
    _Rule(
        ("data.unlabelled",),
        "only data.source=shards and data.source=parquet accept images without a label",
        lambda c, a: c.data.source not in ("shards", "parquet"),
    ),
    _Rule(
        ("data.train",),
        "the images of data.source=digits are scikit-learn's",
        lambda c, a: c.data.source == "digits",
    ),
    _Rule(
        ("data.holdout",),
        "the held-out images are a separate data set",
        lambda c, a: c.data.test is not None or c.data.source in DOWNLOADED,
    ),
    _Rule(
        ("data.match_classes",),
        "held-out images that are split off have the same classes",
        lambda c, a: c.data.test is None and c.data.source not in DOWNLOADED,
    ),
    # How they become arrays.
    _Rule(
        ("views.pad", "views.padding"),
        "only views.kind=shift and views.kind=crop_flip pad",
        lambda c, a: c.views.kind not in ("shift", "crop_flip"),
    ),
    _Rule(
        ("views.scale", "views.ratio"),
        "they apply only to views.kind=random_resized_crop",
        lambda c, a: c.views.kind != "random_resized_crop",
    ),
    _Rule(
        ("views.flip",),
        "only views.kind=crop_flip and views.kind=random_resized_crop mirror",
        lambda c, a: c.views.kind not in ("crop_flip", "random_resized_crop"),
    ),
    _Rule(
        ("views.cutout", "views.randaugment", "views.magnitude", "views.hook"),
        "views.kind=none leaves images as they are",
        lambda c, a: c.views.kind == "none",
    ),
    _Rule(
        ("views.magnitude",),
        "views.randaugment=0 applies no operations",
        lambda c, a: not c.views.randaugment,
    ),
    _Rule(
        ("stream.decoded_bytes",),
        "views.kind=random_resized_crop decodes a different region of an image each time",
        lambda c, a: c.views.kind == "random_resized_crop",
    ),
    _Rule(
        ("stream.cache_dir", "stream.cache_bytes"),
        "they apply only to remote shards, and all shards are local",
        lambda c, a: not any(map(_is_remote, _shards(c))),
    ),
    _Rule(
        ("stream.cache_dir",),
        "stream.cache_bytes=0 keeps nothing",
        lambda c, a: not c.stream.cache_bytes,
    ),
    # Training.
    _Rule(
        ("teacher", "targets.batch"),
        "targets.logits stands in for a teacher",
        lambda c, a: c.targets.logits is not None,
    ),
    *_training_rules("teacher"),
    *_training_rules("student"),
    _Rule(
        ("student.label_smoothing",),
        "student.distill_weight=1 ignores the labels",
        lambda c, a: c.student.distill_weight == 1,
    ),
    _Rule(
        ("student.temperature", "targets.top_k"),
        "student.distill_weight=0 ignores the soft targets",
        lambda c, a: c.student.distill_weight == 0,
    ),
    _Rule(
        ("student.neighbour_loss",),
        "it applies only to graph.scope=dataset",
        lambda c, a: c.graph.scope == "batch",
    ),
    # The graph.
    _Rule(
        (
            *("graph.candidates", "graph.start_epoch", "graph.warmup_epochs"),
            *("graph.refresh_epochs", "graph.keep_versions"),
            *("graph.search", "graph.partition", "graph.sampling", "student.label_dim"),
        ),
        "with graph.scope=batch the images of a batch are each other's candidates",
        lambda c, a: c.graph.scope == "batch",
    ),
    _Rule(
        ("evaluate.gallery", "model.thumbnails"),
        "with graph.scope=batch no training image is a neighbor",
        lambda c, a: c.graph.scope == "batch",
    ),
    _Rule(
        ("graph.search",),
        "on a GPU the search is exact",
        lambda c, a: a.on_gpu,
    ),
    _Rule(
        ("graph.search.recall", "graph.search.warm_start", "graph.search.probes"),
        "graph.search.exact=true searches all images",
        lambda c, a: c.graph.search.exact,
    ),
    _Rule(
        (
            *("graph.partition.partitioner", "graph.partition.repartition_cut"),
            "graph.partition.move_gain",
        ),
        "graph.partition.parts=1 divides nothing",
        lambda c, a: c.graph.partition.parts == 1,
    ),
    _Rule(
        ("graph.partition.repartition_cut", "graph.partition.move_gain"),
        "graph.partition.partitioner=ranges uses only the ids of images",
        lambda c, a: c.graph.partition.partitioner == "ranges",
    ),
    _Rule(
        ("graph.sampling.sampler",),
        "with graph.sampling.query=live and graph.sampling.second_hop=cached nothing is sampled",
        lambda c, a: (c.graph.sampling.query, c.graph.sampling.second_hop) == ("live", "cached"),
    ),
    # What runs the ranks.
    _Rule(
        (
            *(
                "cluster.address",
                "cluster.cpus_per_rank",
                "cluster.max_failures",
                "cluster.grace_s",
                "cluster.wait_s",
            ),
            *("cluster.strategy", "cluster.ranks_per_node", "cluster.min_ranks"),
            *("cluster.rank_resources", "cluster.reader_resources"),
        ),
        "they apply only to ranks under Ray, and a launcher started these",
        lambda c, a: a.inside_ray is False,
    ),
    _Rule(
        ("cluster.reader_resources",),
        "only stream.backend=ray reads in actors",
        lambda c, a: c.stream.backend in ("local", "processes"),
    ),
    _Rule(
        ("cluster.strategy",),
        "cluster.ranks_per_node says how many ranks each node has",
        lambda c, a: c.cluster.ranks_per_node is not None,
    ),
    _Rule(
        ("cluster.min_ranks",),
        "run.ranks is no larger",
        lambda c, a: (c.cluster.min_ranks or 0) >= c.run.ranks,
    ),
    _Rule(
        ("run.ranks",),
        "the launcher started a different number of ranks",
        lambda c, a: a.inside_ray is False and a.ranks not in (None, c.run.ranks),
    ),
    _Rule(
        ("checkpoint.grace_s",),
        "ranks under Ray have cluster.grace_s for their last save",
        lambda c, a: a.inside_ray is True,
    ),
)


def notes(config: Config, surroundings: Surroundings) -> list[str]:
    """A line for each reason why fields that are set have no effect; each field has at most one."""
    said: set[str] = set()
    found = []
    for rule in _RULES:
        if not rule.when(config, surroundings):
            continue
        idle = {name: value for name, value in _set_fields(config, rule.fields) if name not in said}
        if idle:
            said |= idle.keys()
            shown = ", ".join(f"{name}={_text(value)}" for name, value in idle.items())
            found.append(f"{shown} {'has' if len(idle) == 1 else 'have'} no effect: {rule.why}")
    return found + _fanouts(config)


def _fanouts(config: Config) -> list[str]:
    """Lines about ``fanouts`` of which one number, or a part of it, has no effect."""
    graph, sampling, found = config.graph, config.graph.sampling, list[str]()
    if graph.scope != "dataset":
        return found
    cached = sampling.second_hop == "cached"
    drawn = [sampling.query == "table", not cached]  # from the table, which has M candidates
    for hop, (fanout, from_table) in enumerate(zip(sampling.fanouts, drawn, strict=True)):
        if from_table and fanout > graph.candidates:
            found.append(
                f"graph.sampling.fanouts[{hop}]={fanout} is capped at {graph.candidates}: there are "
                f"graph.candidates={graph.candidates} to draw from"
            )
    if cached and sampling.fanouts[1] not in (0, _default(sampling, "fanouts")[1]):
        found.append(
            f"graph.sampling.fanouts[1]={sampling.fanouts[1]} has no effect: "
            "graph.sampling.second_hop=cached averages over all candidates of a neighbor"
        )
    return found


def _set_fields(config: Any, names: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """Those of these fields, and of these sections' fields, that are not at their defaults."""
    for name in names:
        owner = config
        *sections, last = name.split(".")
        for section in sections:
            owner = getattr(owner, section)
        value = getattr(owner, last)
        kind = type(value)
        if hasattr(kind, "model_fields"):
            yield from _set_fields(config, [f"{name}.{inner}" for inner in kind.model_fields])
        elif value != _default(owner, last):
            yield name, value


def _default(section: Any, name: str) -> Any:
    return type(section).model_fields[name].get_default(call_default_factory=True)


def _text(value: Any) -> str:
    """A value as it is written in an override."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{list(value)}" if isinstance(value, tuple) else f"{value}"


def _shards(config: Config) -> list[str]:
    data, found = config.data, list[str]()
    for origin in (data.train, data.test) if data.source == "shards" else ():
        found += [origin] if isinstance(origin, str) else origin or []
    return found


def _is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")
