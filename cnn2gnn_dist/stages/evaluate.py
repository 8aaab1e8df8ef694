"""Stage ``evaluate``: teacher, student and control on the held-out images, and the cost of each."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist import log
from cnn2gnn_dist.data.images.image_files import corrupt_in
from cnn2gnn_dist.data.images.views import CLEAN
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.durable import write_text
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.report.labels import CONTROL, LABELS, MODELS, evaluated, stage_of
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages.compared_models import Row, StudentWithBank, compared_models
from cnn2gnn_dist.stages.shared.context import Context, load_manifest
from cnn2gnn_dist.stages.shared.networks import norms_of
from cnn2gnn_dist.stages.shared.predictions import Predictions, describe_left_out, evaluate
from cnn2gnn_dist.stages.shared.timing import milliseconds_per_image

COST_BATCH = 64
EXAMPLES = 5
"""Number of excluded images to name in the results."""


class _LeftOut(NamedTuple):
    """Held-out images that were not evaluated: images only by name, or corrupt.

    Attributes:
        at_pack: how many ``pack`` did not include in the shards.
        later: the problem of each image of the shards that can't be decoded.
        first: some of both, with the problem.
    """

    at_pack: int
    later: dict[int, str]
    first: list[str]

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.at_pack + len(self.later)


def run(context: Context, keys: dict[str, str]) -> list[Path]:
    """Evaluate every model; write ``results.json`` and what the report shows.

    Raises:
        UserError: more corrupt held-out images than ``data.max_corrupt``, or no others.
    """
    paths, config = context.paths, context.config
    test = load_manifest(paths.test_manifest)
    results: dict[str, Any] = {}
    with_bank: StudentWithBank | None = None
    left_out: dict[int, str] = {}
    rows: dict[str, Row] = {}
    first_N = np.empty(0, np.int64)
    there = ("control" in keys, "teacher" in keys)
    for compared in compared_models(context, test.num_classes, *there):
        seed = config.seed if compared.shuffled else None
        evaluation = evaluate(context, compared.answer, paths.test_manifest, shuffle_seed=seed)
        with_bank, left_out = with_bank or compared.with_bank, evaluation.left_out
        with collectives.uneven():  # rank 0's work alone may take long
            for name, found in evaluation.found.items() if context.ranks.is_first else ():
                rows[name], first_N = compared.rows[name], found.id_N[:COST_BATCH]
                results[name] = {
                    **found.scores(test.num_classes),
                    "evaluated": len(found.id_N),
                    "left_out": _left_out(context, left_out).total,
                    **rows[name].notes,
                    "norms": norms_of(paths.root / stage_of(compared.name)),
                }
                _save(context.folder, name, found)
                _warn_of_failure(context, name, found)

    def report() -> None:
        from cnn2gnn_dist.report.page import write_report  # half a second: matplotlib, for rank 0

        for name, costs in _costs(context, rows, _read(context, first_N)).items():
            results[name].update(costs)
        if with_bank is not None:
            _gallery(context, with_bank)
        results["run"] = _run_facts(context, test, _left_out(context, left_out))
        write_text(paths.results, as_json(results))
        write_report(paths.root, test.classes)
        if left_out:
            context.warn(describe_left_out(left_out, len(test)))
        if not context.inside_ray:  # under Ray the driver prints it, after the ranks' last lines
            log.output(table(results))

    collectives.alone(report)
    return [path for path in sorted(context.folder.glob("*.np*"))]


def _warn_of_failure(context: Context, row: str, found: Predictions) -> None:
    failure = found.failure() if row in MODELS else None
    if failure is not None:
        stage = stage_of(row)
        context.warn(
            f"{LABELS[row]}: {failure}. {found.cause()}: see the loss in "
            f"{stage}/metrics.jsonl; try a smaller {'teacher' if stage == 'teacher' else 'student'}.lr, "
            "label_smoothing or more epochs"
        )


def _left_out(context: Context, later: dict[int, str]) -> _LeftOut:
    """All held-out images that are missing from the results, whichever stage excluded them."""
    at_pack, packed_without = 0, list[str]()
    data = context.config.data
    if (
        data.source == "imagefolder" and data.test is not None
    ):  # otherwise a file of earlier data may be there
        at_pack, packed_without = corrupt_in(context.paths.shards / "test-left-out.json")
    first = [*packed_without, *(later[sample] for sample in sorted(later))]
    return _LeftOut(at_pack, later, first[:EXAMPLES])


def as_json(results: dict[str, Any]) -> str:
    """Return the results as strict JSON.

    Raises:
        UserError: a number is not finite.
    """

    def check(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                check(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list | tuple):
            for place, inner in enumerate(value):
                check(inner, f"{name}[{place}]")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"the result {name} is {value}",
                where="results.json",
                remedy="check metrics.jsonl of that stage for where it diverged",
            )

    check(results, "")
    return json.dumps(results, indent=1, allow_nan=False)


def _read(context: Context, ids: np.ndarray) -> Batch:
    """Read held-out images by their ids, clean view."""
    reader = Reader(ReaderSpec(str(context.paths.test_manifest), context.views()))
    return reader.read(Request(ids, CLEAN))


@torch.no_grad()
def _costs(context: Context, rows: dict[str, Row], batch: Batch) -> dict[str, dict[str, float]]:
    """Of each row: parameters, FLOPs per image (2 per multiply-add, search included), milliseconds per image."""
    images: Tensor = context.to_device(batch)[0]
    times = milliseconds_per_image(
        {name: row.run for name, row in rows.items()}, images, context.config.evaluate.timing_images
    )
    return {
        name: {
            "parameters": row.parameters,
            "flops": row.flops(images) / len(images),
            "ms_per_image": times[name].in_batch,
            "ms_alone": times[name].alone,
        }
        for name, row in rows.items()
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
def _gallery(context: Context, with_bank: StudentWithBank) -> None:
    """Save some test images with their neighbors and weights, half of them misclassified if possible."""
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
    batch = _read(context, ids)
    images, _, _ = context.to_device(batch)
    query = with_bank.around.around_unseen(len(ids))
    output = with_bank.student(images, query)
    assert output.weights_BF is not None
    weights = output.weights_BF.cpu().numpy()
    predicted = output.logits_BC.argmax(1).cpu().numpy()
    confidence = output.logits_BC.softmax(1).max(1).values.cpu().numpy()
    if config.evaluate.flip:  # what was answered, from the mirror image as well
        rows = np.searchsorted(saved["ids"], ids)
        predicted, confidence = saved["predicted"][rows], saved["confidence"][rows]
    order = np.argsort(-weights, axis=1, kind="stable")[:, :8]
    neighbours = np.take_along_axis(query.first_BF, order, 1)
    reader = Reader(ReaderSpec(str(context.paths.train_manifest), context.views()))
    shown = reader.read(Request(neighbours.reshape(-1).clip(min=0), CLEAN))
    np.savez(
        context.folder / "gallery.npz",
        images=batch.images,
        labels=batch.labels,
        predicted=predicted,
        confidence=confidence,
        neighbour_images=shown.images.reshape(*neighbours.shape, *shown.images.shape[1:]),
        neighbour_labels=shown.labels.reshape(neighbours.shape),
        weights=np.take_along_axis(weights, order, 1),
    )


def _run_facts(context: Context, test: Manifest, left_out: _LeftOut) -> dict[str, Any]:
    train = load_manifest(context.paths.train_manifest)
    return {
        "name": context.config.name,
        "train_images": len(train),
        "test_images": len(test),
        "left_out": left_out.first,
        "left_out_at_pack": left_out.at_pack,
        "classes": test.num_classes,
        "device": context.device,
        "precision": {
            model: str(context.compute_dtype(model)).removeprefix("torch.")
            for model in ("teacher", "student")
        },
        "ranks": context.ranks.world_size,
        "seed": context.config.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(results: dict[str, Any]) -> str:
    """Format the results as text."""
    head = ("", "accuracy", "balanced", "ECE", "parameters", "MFLOP/image", "ms/image", "alone")
    lines = ["{:<20}{:>10}{:>10}{:>8}{:>12}{:>13}{:>10}{:>8}".format(*head)]
    for key, label in LABELS.items():
        if key in results:
            r = results[key]
            lines.append(
                f"{label:<20}{r['accuracy']:>9.2%} {r['balanced_accuracy']:>9.2%}{r['ece']:>8.3f}"
                f"{r['parameters']:>12,}{r['flops'] / 1e6:>13.2f}{r['ms_per_image']:>10.3f}"
                + (f"{r['ms_alone']:>8.3f}" if "ms_alone" in r else "")  # older results have none
            )
    student = results.get("student", {})
    if student and CONTROL not in results:
        lines.append("no control (student.control=false): nothing here shows what the graph adds")
    if student.get("left_out"):
        at_pack = results.get("run", {}).get("left_out_at_pack", 0)
        lines.append(
            f"evaluated on {evaluated(student):,} held-out images; "
            f"{student['left_out']:,} that can't be read are left out"
            + (f" ({at_pack:,} of them by pack)" if at_pack else "")
        )
    return "\n".join(lines)
