"""The stages of a run: what each uses, what it builds on, where it writes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.images.decode import DECODING
from cnn2gnn_dist.stages.shared.context import Context

# Fields that change how a result is computed, but not which: a run may be resumed with others. Where the images
# of a batch are the graph (graph.scope=batch) the sizes of batches are not among them (key_relevance.POOLS).
EXECUTION = frozenset(
    [
        *(
            f"{model}.{name}"
            for model in ("teacher", "student")
            for name in ("max_micro_batch", "eval_epochs", "ds_config", "zero_stage")
        ),
        "student.control",
        "targets.batch",
        "graph.keep_versions",
        "evaluate.batch",
        "evaluate.timing_images",
    ]
)


VERSIONS = {
    "version.calibration": 2,
    "version.decoding": DECODING,
    "version.frozen": 2,
    "version.late_decay": 2,
    "version.logit_adjust": 3,
    "version.neighbours": 2,
    "version.rank_norms": 2,
    "version.unlabelled": 2,
    "version.unlabelled_parts": 3,
}
"""Versions of code that keys include like fields. Each is absent from keys while it is the first
(``key_defaults.py``)."""


@dataclass(frozen=True)
class Stage:
    """One step from files to files.

    ``fields``: config sections, fields and versions that determine its outputs; ``needs``: stages it
    builds on; ``alone``: rank 0 works, the others wait; ``trains``: it has checkpoints
    to resume from; ``edits``: what users have changed in its outputs, given the run's folder, which would be lost
    if they were written anew (empty: nothing); ``held``: keeps users from changing them, given the run's folder, while
    they are set aside; ``keeps``: files of a stale result that the next one reads.
    """

    name: str
    folder: str
    fields: tuple[str, ...]
    needs: tuple[str, ...]
    work: Callable[[Context, dict[str, str]], list[Path]]
    alone: bool = False
    trains: bool = False
    edits: Callable[[Path], str] | None = None
    held: Callable[[Path], AbstractContextManager[None]] | None = None
    keeps: tuple[str, ...] = ()


def _pack(context: Context, keys: dict[str, str]) -> list[Path]:
    from cnn2gnn_dist.stages import prepare

    return prepare.pack_run(context)


def _index(context: Context, keys: dict[str, str]) -> list[Path]:
    from cnn2gnn_dist.stages import prepare

    return prepare.index_run(context)


def _teacher(context: Context, keys: dict[str, str]) -> list[Path]:
    from cnn2gnn_dist.stages import teacher

    return teacher.run(context)


def _targets(context: Context, keys: dict[str, str]) -> list[Path]:
    from cnn2gnn_dist.stages import targets

    return targets.run(context, keys.get("teacher", ""))


def _student(context: Context, keys: dict[str, str]) -> list[Path]:
    from cnn2gnn_dist.stages import student

    return student.run(context, context.config.graph.scope, keys["targets"])


def _control(context: Context, keys: dict[str, str]) -> list[Path]:
    from cnn2gnn_dist.stages import student

    return student.run(context, "none", keys["targets"])


def _graph(context: Context, keys: dict[str, str]) -> list[Path]:
    from cnn2gnn_dist.stages import graph

    return graph.run(context)


def _evaluate(context: Context, keys: dict[str, str]) -> list[Path]:
    from cnn2gnn_dist.stages import evaluate

    return evaluate.run(context, keys)


def _model(context: Context, keys: dict[str, str]) -> list[Path]:
    from cnn2gnn_dist.stages import model

    return model.run(context)


def _edits_of_model(root: Path) -> str:
    from cnn2gnn_dist.stages import earlier_models

    return earlier_models.edits_of_run(root)


def _held_model(root: Path) -> AbstractContextManager[None]:
    from cnn2gnn_dist.inference.folder import artefact
    from cnn2gnn_dist.inference.memory import turns

    return turns.editing_if_there(root / _MODEL.folder / artefact.MEMORY)


_PACK = Stage(
    "pack",
    "shards",
    (
        "seed",
        "data.source",
        "data.shard_size",
        "data.limit",
        "data.image_column",
        "data.label_column",
        "data.unlabelled",
        "version.decoding",
    ),
    (),
    _pack,
    alone=True,
)
_INDEX = Stage(
    "index",
    "manifest",
    (
        "seed",
        "data.holdout",
        "data.calibration",
        "data.relabel",
        "data.num_classes",
        "data.match_classes",
        "data.allow_empty_classes",
        "data.unlabelled",
        "data.checksums",
        "version.decoding",
    ),
    ("pack",),
    _index,
    alone=True,
)
_TEACHER = Stage(
    "teacher",
    "teacher",
    (
        "seed",
        "precision",
        "views",
        "stream.window",
        "teacher",
        "version.decoding",
        "version.frozen",
        "version.unlabelled",
    ),
    ("index",),
    _teacher,
    trains=True,
)
_TARGETS = Stage(
    "targets",
    "targets",
    ("seed", "precision", "views", "targets", "version.rank_norms"),
    ("index", "teacher"),
    _targets,
)
_LEARN = (
    "seed",
    "precision",
    "views",
    "stream.window",
    "targets.views",
    "student",
    "version.decoding",  # with targets.logits there is no teacher that would be stale
    "version.frozen",
    "version.logit_adjust",
)
_STUDENT = Stage(
    "student",
    "student",
    (
        *(*_LEARN, "graph"),
        "data.checksums",  # they tell twins
        *("version.late_decay", "version.neighbours", "version.unlabelled_parts"),
    ),
    ("index", "targets"),
    _student,
    trains=True,
)
_GRAPH = Stage(
    "graph", "graph", ("precision", "graph", "data.checksums"), ("index", "student"), _graph
)
_CONTROL = Stage("control", "control", _LEARN, ("index", "targets"), _control, trains=True)
_EVALUATE = Stage(
    "evaluate",
    "evaluation",
    ("precision", "evaluate"),
    ("index", "teacher", "student", "graph", "control"),
    _evaluate,
)
_MODEL = Stage(
    "model",
    "model",
    ("seed", "views", "model", "version.calibration"),
    ("index", "student", "graph", "evaluate"),
    _model,
    alone=True,
    edits=_edits_of_model,
    held=_held_model,
    keeps=("memory/forgotten.csv",),
)


STAGES = {
    stage.name: stage
    for stage in (_PACK, _INDEX, _TEACHER, _TARGETS, _STUDENT, _GRAPH, _CONTROL, _EVALUATE, _MODEL)
}
"""All stages, by name."""


def stages_of(config: Config) -> list[Stage]:
    """The stages of a run, in order."""
    found = [_INDEX, _TEACHER, _TARGETS, _STUDENT]
    if config.targets.logits is not None:
        found.remove(_TEACHER)
    if config.data.source != "shards":
        found.insert(0, _PACK)
    if config.graph.scope == "dataset":
        found.append(_GRAPH)
    if config.student.control:
        found.append(_CONTROL)
    return [*found, _EVALUATE, _MODEL]
