"""Stage ``evaluate``: teacher, student and control on the held-out images, and what each costs."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnn2gnn_dist.data.manifest import Manifest
from cnn2gnn_dist.data.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.data.views import CLEAN
from cnn2gnn_dist.durable import write_text
from cnn2gnn_dist.graph.bank import latest_version, open_version
from cnn2gnn_dist.models.cost import count_flops, count_parameters
from cnn2gnn_dist.models.student import Scope, Student
from cnn2gnn_dist.report import write_report
from cnn2gnn_dist.stages.context import Context, load_manifest
from cnn2gnn_dist.stages.judge import Predictions, predict_all
from cnn2gnn_dist.stages.neighbourhood import Neighbourhood
from cnn2gnn_dist.stages.networks import Teacher, build_student, load_model, norms_of
from cnn2gnn_dist.stages.timing import milliseconds_an_image
from cnn2gnn_dist.training import distributed
from cnn2gnn_dist.training.checkpoint import Checkpoints

COST_BATCH = 64


@dataclass
class Contestant:
    """One trained model: how it classifies uint8 images, and what its search adds in FLOPs."""

    name: str
    model: nn.Module
    classify: Callable[[Tensor], Tensor]
    search_flops: float = 0.0
    notes: dict[str, Any] | None = None
    shuffled: bool = False


def run(context: Context, keys: dict[str, str]) -> list[Path]:
    """Judge every model; write ``results.json`` and what the report shows."""
    paths, config = context.paths, context.config
    test = load_manifest(paths.test_manifest)
    results: dict[str, Any] = {}
    for contestant in contestants(context, test.num_classes, keys):
        found = predict_all(
            context,
            _ignoring_batch(contestant.classify),
            paths.test_manifest,
            config.evaluate.batch,
            shuffle_seed=config.seed if contestant.shuffled else None,
        )
        with distributed.uneven():  # what rank 0 does alone may take long
            if context.ranks.is_first:
                results[contestant.name] = {
                    **found.scores(test.num_classes),
                    **_costs(context, contestant, test),
                    **(contestant.notes or {}),
                    "norms": norms_of(paths.root, contestant.name),
                }
                _save(context.folder, contestant.name, found)

    def report() -> None:
        if config.graph.scope == "dataset" and "graph" in keys:
            _gallery(context, keys, test)
        results["run"] = _circumstances(context, test)
        write_text(paths.results, json.dumps(results, indent=1))
        write_report(paths.root, test.classes)
        if not context.inside_ray:  # under Ray the driver shows it, after the ranks' last lines
            print(table(results), flush=True)

    distributed.alone(report)
    return [path for path in sorted(context.folder.glob("*.np*"))]


def _ignoring_batch(classify: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    return lambda images, _: classify(images)


def contestants(context: Context, num_classes: int, keys: dict[str, str]) -> list[Contestant]:
    """The models of the run that are trained: teacher, student, control."""
    teacher = Teacher(context.config, num_classes, initial=False)
    _load(context, teacher, "teacher", keys)
    found = [Contestant("teacher", teacher, teacher)]
    found.append(_student(context, num_classes, keys))
    if "control" in keys:
        control = build_student(context.config, num_classes, "none")
        _load(context, control, "control", keys)
        found.append(
            Contestant("control_mlp", control, lambda images: control(images, None).logits_BC)
        )
    return found


def _student(context: Context, num_classes: int, keys: dict[str, str]) -> Contestant:
    config = context.config
    scope: Scope = config.graph.scope
    student = build_student(config, num_classes, scope)
    _load(context, student, "student", keys)
    if scope == "batch":
        return Contestant(
            "student", student, lambda images: student(images).logits_BC, shuffled=True
        )
    around = open_bank(context)
    flops = around.flops_per_query
    return Contestant(
        "student",
        student,
        lambda images: student(images, around.around_unseen(len(images))).logits_BC,
        search_flops=flops,
        notes={"graph": around.version.meta, "self_path": self_path_note(student)},
    )


def open_bank(context: Context) -> Neighbourhood:
    """The final graph with all of its partitions."""
    folder = latest_version(context.paths.root / "graph")
    assert folder is not None, "the pipeline runs the graph stage first"
    return Neighbourhood(context, open_version(folder), None)


def self_path_note(student: Student) -> dict[str, int]:
    """How many of the parameters only the graph path has."""
    return {"graph_parameters": sum(p.numel() for p in student.graph_parameters().values())}


def _load(context: Context, model: nn.Module, stage: str, keys: dict[str, str]) -> None:
    checkpoints = Checkpoints(context.paths.root / stage / "checkpoints", keys[stage])
    load_model(model, checkpoints, stage)
    model.to(context.device).eval()


@torch.no_grad()
def _costs(context: Context, contestant: Contestant, test: Manifest) -> dict[str, float]:
    """Parameters, FLOPs an image (2 a multiply-add, search included), milliseconds an image."""
    reader = Reader(ReaderSpec(str(context.paths.test_manifest), context.views()))
    count = min(COST_BATCH, len(test))
    batch: Batch = reader.read(Request(np.arange(count), CLEAN))
    images, _, _ = context.to_device(batch)
    flops = count_flops(contestant.classify, images) / count + contestant.search_flops
    return {
        "parameters": count_parameters(contestant.model),
        "flops": flops,
        "ms_per_image": milliseconds_an_image(
            contestant.classify, images, context.config.evaluate.timing_images
        ),
    }


def _save(folder: Path, name: str, found: Predictions) -> None:
    np.savez(
        folder / f"{name}.npz",
        ids=found.id_N,
        predicted=found.predicted_N,
        confidence=found.confidence_N,
        labels=found.label_N,
    )


@torch.no_grad()
def _gallery(context: Context, keys: dict[str, str], test: Manifest) -> None:
    """Some test images with their neighbours and weights: half wrong ones where there are any."""
    config = context.config
    saved = np.load(context.folder / "student.npz")
    wrong = saved["ids"][saved["predicted"] != saved["labels"]]
    right = saved["ids"][saved["predicted"] == saved["labels"]]
    rng = np.random.default_rng(config.seed)
    bad = rng.permutation(wrong)[: config.evaluate.gallery // 2]
    good = rng.permutation(right)[: config.evaluate.gallery - len(bad)]
    ids = np.concatenate([bad, good])
    if not len(ids):
        return
    student = build_student(config, test.num_classes, "dataset")
    _load(context, student, "student", keys)
    spec = context.views()
    batch = Reader(ReaderSpec(str(context.paths.test_manifest), spec)).read(Request(ids, CLEAN))
    images, _, _ = context.to_device(batch)
    around = open_bank(context)
    query = around.around_unseen(len(ids))
    output = student(images, query)
    assert output.weights_BF is not None
    weights = output.weights_BF.cpu().numpy()
    order = np.argsort(-weights, axis=1, kind="stable")[:, :8]
    neighbours = np.take_along_axis(query.first_BF, order, 1)
    reader = Reader(ReaderSpec(str(context.paths.train_manifest), spec))
    shown = reader.read(Request(neighbours.reshape(-1).clip(min=0), CLEAN))
    np.savez(
        context.folder / "gallery.npz",
        images=batch.images,
        labels=batch.labels,
        predicted=output.logits_BC.argmax(1).cpu().numpy(),
        confidence=output.logits_BC.softmax(1).max(1).values.cpu().numpy(),
        neighbour_images=shown.images.reshape(*neighbours.shape, *shown.images.shape[1:]),
        neighbour_labels=shown.labels.reshape(neighbours.shape),
        weights=np.take_along_axis(weights, order, 1),
    )


def _circumstances(context: Context, test: Manifest) -> dict[str, Any]:
    train = load_manifest(context.paths.train_manifest)
    return {
        "name": context.config.name,
        "train_images": len(train),
        "test_images": len(test),
        "classes": test.num_classes,
        "device": context.device,
        "ranks": context.ranks.world_size,
        "seed": context.config.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


ROWS = {"teacher": "teacher", "student": "student (graph)", "control_mlp": "control (MLP head)"}


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    head = ("", "accuracy", "balanced", "ECE", "parameters", "MFLOP/image", "ms/image")
    lines = ["{:<20}{:>10}{:>10}{:>8}{:>12}{:>13}{:>10}".format(*head)]
    for key, label in ROWS.items():
        if key in results:
            r = results[key]
            lines.append(
                f"{label:<20}{r['accuracy']:>9.2%} {r['balanced_accuracy']:>9.2%}{r['ece']:>8.3f}"
                f"{r['parameters']:>12,}{r['flops'] / 1e6:>13.2f}{r['ms_per_image']:>10.3f}"
            )
    return "\n".join(lines)
