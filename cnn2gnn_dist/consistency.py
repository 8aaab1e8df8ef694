"""Config fields that don't fit together: which one to change, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from cnn2gnn_dist import unused_fields
from cnn2gnn_dist.unused_fields import Surroundings

if TYPE_CHECKING:
    from cnn2gnn_dist.config import Config, GraphConfig, ViewsConfig


def refuse(what: str, field: str, remedy: str) -> PydanticCustomError:
    """Return the error that settings.py shows with this field and remedy."""
    return PydanticCustomError(
        "refused", "{what}", {"what": what, "field": field, "remedy": remedy}
    )


def check_views(views: ViewsConfig) -> None:
    """Check that ranges are ordered, pixel moments are from 0 to 1, and padding is below the image size."""
    defaults = {name: field.default for name, field in type(views).model_fields.items()}
    for name, most in (("scale", 1.0), ("ratio", float("inf"))):
        low, high = getattr(views, name)
        if not 0 < low <= high <= most:
            limit = ", and at most 1" if most == 1 else ""
            raise refuse(
                f"[{low:g}, {high:g}] is not a range: the smaller value first, above 0{limit}",
                f"views.{name}",
                f"views.{name}='{list(defaults[name])}' is the default",
            )
    for name, values in (("mean", views.mean), ("std", views.std)):
        if max(values) > 1 or min(values) < 0 or (name == "std" and min(values) == 0):
            allowed = "above 0 and at most 1" if name == "std" else "from 0 to 1"
            raise refuse(
                f"{list(values)}: the {name} of a channel must be {allowed}, for pixels from 0 to 1",
                f"views.{name}",
                f"divide values for pixels from 0 to 255 by 255; views.{name}='{list(defaults[name])}' "
                "are ImageNet's",
            )
    if views.kind in ("shift", "crop_flip") and views.pad >= views.size:
        raise refuse(
            f"pad {views.pad} with images of {views.size} pixels: some views would be all padding",
            "views.pad",
            f"views.pad={views.size // 8}",
        )


def check_graph(graph: GraphConfig) -> None:
    """Check for enough candidates for the neighbors, in the table and in both hops; distdgl's limits."""
    sampling, k = graph.sampling, graph.neighbours
    first, second = sampling.fanouts
    if k >= graph.candidates:
        raise refuse(
            f"neighbours k={k} must be less than candidates M={graph.candidates}: "
            "the closed form needs the distance of the k+1st",
            "graph.neighbours",
            f"graph.neighbours={max(1, min(graph.candidates, first) - 1)} at most, "
            "or more graph.candidates",
        )
    if sampling.sampler == "distdgl" and (sampling.query, sampling.second_hop) != (
        "table",
        "sampled",
    ):
        raise refuse(
            "sampler=distdgl needs query=table and second_hop=sampled: its servers return "
            "neighbors and rows, but don't search or average",
            "graph.sampling.sampler",
            "graph.sampling.query=table graph.sampling.second_hop=sampled, or graph.sampling.sampler=table",
        )
    if graph.scope != "dataset":
        return  # the images of a batch are each other's candidates
    least = 0 if sampling.second_hop == "cached" else 2
    if first < 2:
        raise refuse(
            f"fanouts {[first, second]}: a weight in the first hop needs 2 candidates",
            "graph.sampling.fanouts",
            f"graph.sampling.fanouts='[{k + 1}, {max(second, least)}]' for all k={k} neighbors",
        )
    if second < least:
        raise refuse(
            f"fanouts {[first, second]}: a weight in the second hop needs 2 candidates",
            "graph.sampling.fanouts",
            f"graph.sampling.fanouts='[{first}, {max(2, min(k + 1, 8))}]', or graph.sampling.second_hop=cached",
        )


def check_batch_scope(config: Config) -> None:
    """Check that batches hold enough candidates where the batch is the graph."""
    graph, student = config.graph, config.student
    rows = min(student.global_batch, student.max_micro_batch)
    if graph.scope == "batch" and rows < graph.neighbours + 2:
        raise refuse(
            "with graph.scope=batch the images of a batch are each other's candidates: "
            f"{rows} are too few for k={graph.neighbours} neighbors",
            "graph.neighbours",
            f"student.global_batch and student.max_micro_batch of {graph.neighbours + 2} or more, "
            "or fewer graph.neighbours",
        )


def check_teacher(config: Config) -> None:
    """Check that there is a teacher, trained or given, and that precomputed logits are of the clean images."""
    if config.targets.logits is not None and config.targets.views:
        raise refuse(
            f"targets.logits has one row per image, but targets.views={config.targets.views} asks for logits of "
            "augmented views",
            "targets.views",
            "targets.views=0",
        )
    if not config.teacher.epochs and not (config.teacher.weights or config.targets.logits):
        raise refuse(
            "a teacher trained for 0 epochs has learned nothing",
            "teacher.epochs",
            "teacher.weights=FILE with a trained network, targets.logits=FILE, or 1 or more epochs",
        )


def check_sizes(config: Config) -> None:
    """Check that early images are smaller than the later ones."""
    for part, train in (("teacher", config.teacher), ("student", config.student)):
        if train.early_size is not None and train.early_size >= config.views.size:
            raise refuse(
                f"early images of {train.early_size} pixels, later ones of {config.views.size}: early ones must be "
                "smaller",
                f"{part}.early_size",
                f"less than views.size={config.views.size}, or null",
            )


RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
"""Resources that Ray counts by itself, and refuses to be asked for by these names."""


def check_resources(config: Config) -> None:
    """Check that custom resources are custom ones, and amounts of them."""
    for name in ("rank_resources", "reader_resources"):
        for resource, amount in getattr(config.cluster, name).items():
            if resource in RAYS_OWN or amount <= 0:
                own = "is Ray's own" if resource in RAYS_OWN else "an amount is above 0"
                raise refuse(
                    f"{resource}: {amount:g} can't be asked for: {own}",
                    f"cluster.{name}",
                    "a resource that some nodes were started with (ray start --resources), such as {trainer: 1}; "
                    "cores of a rank: cluster.cpus_per_rank",
                )


def notes(config: Config, surroundings: Surroundings | None = None) -> list[str]:
    """Settings that run, but probably not as intended; in trials with few epochs they may be deliberate.

    Args:
        config: of the run.
        surroundings: what else is known; None: nothing.
    """
    return _probably_unintended(config) + unused_fields.notes(
        config, surroundings or Surroundings()
    )


def _probably_unintended(config: Config) -> list[str]:
    graph, student, found = config.graph, config.student, list[str]()
    if config.data.source == "digits" and config.data.test is not None:
        found.append(
            f"data.test={config.data.test}: data.source=digits has one set of images, which is "
            "packed twice: the student is evaluated on images that it was trained on; "
            "data.test=null holds some out"
        )
    if config.data.source == "shards" and config.data.limit is not None:
        found.append(
            f"data.limit={config.data.limit} limits packing, and nothing is packed: all of the "
            "shards are used; list fewer shards in data.train"
        )
    for part, train in (("teacher", config.teacher), ("student", student)):
        if train.schedule == "cosine" and train.warmup_epochs > train.epochs / 2:
            found.append(
                f"{part}.warmup_epochs={train.warmup_epochs:g} is capped at half of the "
                f"{train.epochs} epochs of training"
            )
        if train.early_size is not None and round(train.early_share * train.epochs) == train.epochs:
            found.append(
                f"{part}.early_size={train.early_size} with {part}.early_share={train.early_share:g} of "
                f"{train.epochs} epochs leaves none at views.size={config.views.size}, which answers are of, and sizes "
                f"that a network has not seen suit it badly; to train at that size alone: {part}.early_size=null"
            )
    if config.data.unlabelled and not student.distill_weight:
        found.append(
            "student.distill_weight=0 with data.unlabelled=true: the student learns from labels alone, and images "
            "without one fill its batches with gradients of 0; to learn from the teacher's answers for them: "
            "student.distill_weight=0.9"
        )
    if graph.scope != "dataset":
        return found
    if graph.start_epoch >= student.epochs:
        found.append(
            f"graph.start_epoch={graph.start_epoch} with student.epochs={student.epochs}: the "
            "student never trains with the graph, which then adds nothing; to start earlier: "
            f"graph.start_epoch={student.epochs // 2}"
        )
    found += _small_neighbours(config)
    first, k = graph.sampling.fanouts[0], graph.neighbours
    if first <= k:
        found.append(
            f"graph.sampling.fanouts[0]={first} with graph.neighbours={k}: only {first - 1} neighbors of a "
            "seed have a weight, since the closed form needs one more candidate; for all of them: "
            f"graph.sampling.fanouts='[{k + 1}, {graph.sampling.fanouts[1]}]'"
        )
    return found


def _small_neighbours(config: Config) -> list[str]:
    """A note if a graph of small images (``early_size``) is used on in epochs of large ones."""
    student, graph = config.student, config.graph
    if student.early_size is None:
        return []
    large = round(student.early_share * student.epochs)  # the first epoch of large images
    since, every = large - graph.start_epoch, graph.refresh_epochs
    refresh = large + -since % every
    if since <= 0 or refresh == large or large >= student.epochs:
        return []
    until = f"until epoch {refresh}" if refresh < student.epochs else "to the end"
    return [
        f"student.early_size={student.early_size} ends after {large} epochs, between two builds of the graph: from "
        f"there {until} images find neighbors by features of smaller ones; to build one there: graph.refresh_epochs=1"
    ]
