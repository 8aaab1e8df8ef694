"""Fields of a config that do not go together: which one to change, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from cnn2gnn_dist.config import Config, GraphConfig, TrainConfig, ViewsConfig


def refuse(what: str, field: str, remedy: str) -> PydanticCustomError:
    """The error that settings.py shows with this field and remedy."""
    return PydanticCustomError(
        "refused", "{what}", {"what": what, "field": field, "remedy": remedy}
    )


def check_views(views: ViewsConfig) -> None:
    """Ranges in order, moments of pixels from 0 to 1, padding below the image's size."""
    defaults = {name: field.default for name, field in type(views).model_fields.items()}
    for name, most in (("scale", 1.0), ("ratio", float("inf"))):
        low, high = getattr(views, name)
        if not 0 < low <= high <= most:
            limit = ", and at most 1" if most == 1 else ""
            raise refuse(
                f"[{low:g}, {high:g}] is no range: the smaller one first, above 0{limit}",
                f"views.{name}",
                f"views.{name}='{list(defaults[name])}' is the default",
            )
    for name, values in (("mean", views.mean), ("std", views.std)):
        if max(values) > 1 or min(values) < 0 or (name == "std" and min(values) == 0):
            allowed = "above 0 and at most 1" if name == "std" else "from 0 to 1"
            raise refuse(
                f"{list(values)}: the {name} of a channel is {allowed}, of pixels from 0 to 1",
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


def check_warmup(part: str, train: TrainConfig) -> None:
    """The warm-up of ``part`` (teacher, student) ends within its training."""
    if train.warmup_epochs > train.epochs:
        raise refuse(
            f"a warm-up of {train.warmup_epochs:g} epochs is longer than the training of "
            f"{train.epochs}: the learning rate would never reach lr",
            f"{part}.warmup_epochs",
            f"{part}.warmup_epochs={train.epochs / 4:g}, or more {part}.epochs",
        )


def check_graph(graph: GraphConfig) -> None:
    """Enough candidates for the neighbours, in the table and in both hops; what distdgl can do."""
    k, (first, second) = graph.neighbours, graph.fanouts
    if k >= graph.candidates:
        raise refuse(
            f"neighbours k={k} must be less than candidates M={graph.candidates}: "
            "the closed form needs the distance of the k+1st",
            "graph.neighbours",
            f"graph.neighbours={max(1, min(graph.candidates, first) - 1)} at most, "
            "or more graph.candidates",
        )
    if graph.sampler == "distdgl" and (graph.query, graph.second_hop) != ("table", "sampled"):
        raise refuse(
            "sampler=distdgl needs query=table and second_hop=sampled: servers answer with "
            "neighbours and rows, they don't search or average",
            "graph.sampler",
            "graph.query=table graph.second_hop=sampled, or graph.sampler=table",
        )
    if graph.scope != "dataset":
        return  # the images of a batch are each other's candidates
    least = 0 if graph.second_hop == "cached" else 2
    if first <= k:
        raise refuse(
            f"fanouts {[first, second]} with neighbours k={k}: the closed form needs k+1 candidates "
            f"of a seed; with {first} only {max(first - 1, 0)} would have a weight",
            "graph.fanouts",
            f"graph.fanouts='[{k + 1}, {max(second, least)}]' at least, or fewer graph.neighbours",
        )
    if second < least:
        raise refuse(
            f"fanouts {[first, second]}: a weight in the second hop needs 2 candidates",
            "graph.fanouts",
            f"graph.fanouts='[{first}, {max(2, min(k + 1, 8))}]', or graph.second_hop=cached",
        )


def check_whole(config: Config) -> None:
    """The graph begins within the student's training; batches hold enough candidates."""
    graph, student = config.graph, config.student
    if graph.scope == "dataset" and graph.start_epoch >= student.epochs:
        raise refuse(
            f"the graph would begin at epoch {graph.start_epoch} of a student whose epochs are 0 to "
            f"{student.epochs - 1}: it would never be trained with",
            "graph.start_epoch",
            f"graph.start_epoch={student.epochs // 2}, or student.epochs={graph.start_epoch + 1} "
            "or more",
        )
    rows = min(student.global_batch, student.max_micro_batch)
    if graph.scope == "batch" and rows < graph.neighbours + 2:
        raise refuse(
            "in the scope batch the images of a batch are each other's candidates: "
            f"{rows} are too few for k={graph.neighbours} neighbours",
            "graph.neighbours",
            f"student.global_batch and student.max_micro_batch of {graph.neighbours + 2} or more, "
            "or fewer graph.neighbours",
        )
