"""Which of a stage's fields and versions can change its result under a given config; keys leave out the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnn2gnn_dist import settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.pipeline.key_defaults import DEFAULTS
from cnn2gnn_dist.pipeline.registry import Stage
from cnn2gnn_dist.stages.shared.context import RunPaths
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder

_MICRO = "student.max_micro_batch"
POOLS = {
    "student": frozenset({_MICRO}),
    "evaluate": frozenset({"evaluate.batch"}),
}
"""By stage, the fields that count with ``graph.scope=batch``, where the images of a batch are the graph."""
GIVEN = frozenset(f"teacher.{name}" for name in ("epochs", "arch", "args", "pretrained", "weights"))
"""The teacher's fields that count if it is not trained."""
_RATES = {
    "teacher": ("teacher.bias_lr", "teacher.head_lr"),
    "student": ("student.bias_lr", "student.stem_lr", "graph.gate_lr"),
}
"""Factors of the learning rate, by the model that they are of."""


def drop_idle(
    found: dict[str, Any], stage: Stage, config: Config, recorded: Mapping[str, Any] | None
) -> None:
    """Remove from a stage's fields and versions those that have no effect under this config.

    Args:
        found: by dotted names, with the effects of the DeepSpeed configs (``ds_config``); changed in place.
        stage: theirs.
        config: of the run.
        recorded: the fields of the stage's record, finished or begun; None: it has none.
    """
    values = settings.as_flat(config)
    if stage.name == "teacher" and not values["teacher.epochs"]:
        _drop_training(found, recorded)
    for name in ("student.logit_adjust", "data.unlabelled", "data.calibration"):
        if not values[name]:  # without, all its versions are alike
            found.pop(f"version.{name.rpartition('.')[2]}", None)
    if not _freezes(found, values):
        found.pop("version.frozen", None)
    if not _decays_late(found, values):
        found.pop("version.late_decay", None)
    if not values["data.unlabelled"] or not _has_followers(config):
        found.pop("version.unlabelled_parts", None)
    if not _rounded_neighbours(config):
        found.pop("version.neighbours", None)
    if "version.rank_norms" not in (recorded or {}) and not _has_rank_norms(config):
        found.pop("version.rank_norms", None)
    if not _finds_twins(stage, config):
        found.pop("data.checksums", None)
    if _MICRO in found:
        found[_MICRO] = _micro_batch(found, recorded or {})
    for name in ("data.checksums", *POOLS["student"]):
        if (
            recorded is not None and name not in recorded
        ):  # records from before it counted stay valid
            found.pop(name, None)


def _micro_batch(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> Any:
    """The micro-batch that stands in the key for this one: all that hold the whole batch are alike.

    It is not left out: in a record without it, it does not count.
    """
    alike = (recorded.get(_MICRO, 0), DEFAULTS[_MICRO], found[_MICRO])
    whole = [size for size in alike if size >= found["student.global_batch"]]
    return whole[0] if found[_MICRO] in whole else found[_MICRO]


def _freezes(found: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether something is frozen, and gradients are clipped (a DeepSpeed config may do that as well)."""
    return any(
        found.get(rate) == 0 and (values[f"{model}.clip"] or f"{model}.ds_config" in found)
        for model, rates in _RATES.items()
        for rate in rates
    )


def _decays_late(found: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether the graph's parameters start late under an Adam that adds the weight decay to the gradient."""
    file = found.get("student.ds_config", {})
    adds = (
        values["student.optimizer"] == "adamw"
        and file.get("optimizer.type") == "Adam"
        and file.get("optimizer.params.adam_w_mode") is False
        and file.get("optimizer.params.weight_decay", values["student.weight_decay"])
    )
    return bool(adds and values["graph.scope"] == "dataset" and values["graph.start_epoch"])


def _has_followers(config: Config) -> bool:
    """Whether images without a label are assigned to the partitions of others: with a table they never were."""
    graph = config.graph
    live = graph.scope == "dataset" and graph.sampling.query == "live"
    return live and graph.partition.parts > 1


def _rounded_neighbours(config: Config) -> bool:
    """Whether the neighbors' weights were rounded so much that it counts.

    A sampled second hop differs by rounding, and only where "auto" is bfloat16: such runs stay complete. With a
    batch's graph "auto" counts on any device, which the config does not tell: a student that a CPU without
    bfloat16 has trained in float32 is stale although nothing was rounded.
    """
    graph, exact = config.graph, config.precision == "float32"
    cached = graph.scope == "dataset" and graph.sampling.second_hop == "cached"
    return config.precision == "bfloat16" or (graph.scope == "batch" and not exact) or cached


def _finds_twins(stage: Stage, config: Config) -> bool:
    """Whether images that are the same are found by their checksums, which may be recorded or not."""
    if stage.name == "student" and config.graph.scope != "dataset":
        return False
    named = config.data.train if config.data.source == "shards" else None
    return not any(map(is_remote, [named] if isinstance(named, str) else named or []))


def _has_rank_norms(config: Config) -> bool:
    """Whether the teacher's last checkpoint was written under ZeRO-3, with BatchNorm, by several ranks.

    The config does not tell: a run may go on with another ZeRO stage, and with other ranks.
    """
    if config.teacher.average != "none" or config.targets.logits or not config.teacher.epochs:
        return False
    path = checkpoint_folder.recorded(RunPaths(Path(str(config.run.dir))).root / "teacher")
    try:
        state = checkpoint_folder.read_state(path) if path else {}
    except UserError:  # it is only in the run's storage
        return False
    several = state.get("world_size", 1) > 1 and state.get("zero_stage") == 3
    return bool(several and state.get("extra", {}).get("norms", True))  # earlier ones don't say


def _drop_training(found: dict[str, Any], recorded: Mapping[str, Any] | None) -> None:
    """Leave how a teacher is trained out of the key of one that is used as given, but not how it computes targets.

    Records from before this have those fields in their keys: they stay valid.
    """
    exact = _exact(found)

    def trains(name: str) -> bool:
        return name == "stream.window" or (name.startswith("teacher.") and name not in GIVEN)

    for name in filter(trains, list(found)):
        del found[name]
    before = recorded or {}
    if before.get("teacher.epochs") == 0 and _exact(before) == exact:
        found |= {name: before[name] for name in filter(trains, before)}
    elif exact:
        found["teacher.ds_config"] = exact


def _exact(found: Mapping[str, Any]) -> dict[str, Any]:
    """What in the teacher's DeepSpeed config makes it compute in float32 everywhere; empty: nothing does."""
    off = found.get("teacher.ds_config", {}).get("torch_autocast.enabled") is False
    auto = found.get("precision", "auto") == "auto"  # some records are older than the field
    return {"torch_autocast.enabled": False} if off and auto else {}
