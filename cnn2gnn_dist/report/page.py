"""``report.html``: one self-contained file that shows the results of a run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.report import figures
from cnn2gnn_dist.report.labels import CONTROL, LABELS, MODELS, evaluated, stage_of

TEMPLATE, AUDIT = "report.html.j2", "report_audit.html.j2"
BEGINS, ENDS = "<!-- audit begins -->", "<!-- audit ends -->"
"""Around the audit's section in the page."""
COLUMNS = (
    ("accuracy", "accuracy", "{:.2%}", max),
    ("balanced_accuracy", "class-balanced", "{:.2%}", max),
    ("ece", "calibration error", "{:.3f}", min),
    ("parameters", "parameters", "{:,}", min),
    ("flops", "MFLOP / image", "{:.2f}", min),
    ("ms_per_image", "ms / image", "{:.3f}", min),
    ("ms_alone", "ms alone", "{:.3f}", min),
)
CURVES = (
    ("loss", "training loss", False),
    ("accuracy", "training accuracy", True),
    ("images_per_s", "images per second", False),
    ("wait_share", "share of time waiting for data", True),
)
FEW_PAIRS, MANY_PAIRS = 8, 30


def write_report(
    root: Path, class_names: Sequence[str] | None = None, audit: dict[str, Any] | None = None
) -> Path:
    """Write ``report.html`` and ``evaluation/confusion.png`` of a finished run.

    Returns the page's path. What a run does not have (graph, control, gallery, curves) is left out.
    Classes without a name in ``class_names`` are shown as numbers; ``audit`` is what
    ``stages/audit_digest.py`` found in the training images.

    Raises:
        UserError: the run has no ``results.json`` yet.
    """
    results = _results(root / "results.json")
    # Of the models in the table only: a training that the config no longer has may have left its log.
    metrics = {
        stage_of(name): _metrics(root / stage_of(name)) for name in MODELS if name in results
    }
    metrics = {stage: lines for stage, lines in metrics.items() if lines}
    saved = {
        name: dict(np.load(root / "evaluation" / f"{name}.npz"))
        for name in LABELS
        if name in results and (root / "evaluation" / f"{name}.npz").exists()
    }
    student, config = saved.get("student"), root / "config.yaml"
    names = list(class_names or ())
    # Numbers for classes without names, so that a short list does not prevent the page.
    names += [str(number) for number in range(len(names), results["run"]["classes"])]
    graph = results["student"].get("graph")
    page = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            run=results["run"],
            header=[title for _, title, _, _ in COLUMNS],
            rows=table_rows(results),
            verdict=verdict(results, saved),
            left_out=_left_out(results),
            curves=_curves(metrics),
            speed=_speed(metrics),
            graph=graph,
            degrees=figures.uri(figures.degrees(graph["degree"]["histogram"])) if graph else None,
            homophily=_maybe(figures.homophily(metrics.get("student", []))),
            confusion=_confusion(root, student, names),
            classes=len(names),
            pairs=confused_pairs(student, names),
            reliability=figures.uri(figures.reliability(saved)) if saved else None,
            gallery=_gallery(root / "evaluation" / "gallery.npz", names),
            audit=audit,
            config=config.read_text(encoding="utf-8") if config.exists() else None,
        )
    )
    path = root / "report.html"
    durable.write_text(path, page)
    return path


def add_audit(root: Path, class_names: Sequence[str], audit: dict[str, Any]) -> Path:
    """Put the audit's section into the report of a run, whose pictures stay as they are.

    Arguments, result and errors are those of ``write_report``, which is called where there is no report yet.
    """
    path = root / "report.html"
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    before, _, rest = page.partition(BEGINS)
    _, ends, after = rest.partition(ENDS)
    if not ends:
        return write_report(root, class_names, audit)
    section = _environment().get_template(AUDIT).render(audit=audit)
    durable.write_text(path, "".join([before, BEGINS, section, ENDS, after]))
    return path


def _results(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "this folder has no results to report",
            where=str(path),
            remedy="`cnn2gnn evaluate` with the run's config, or name another folder",
        ) from None


def table_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: label and cells (text, whether it is the best in its column)."""
    there = [name for name in LABELS if name in results]
    rows = []
    for name in there:
        cells = []
        for key, _, form, better in COLUMNS:
            value = results[name].get(key)
            if value is None:  # of a version that did not measure it
                cells.append(("", False))
                continue
            best = better(results[other][key] for other in there if key in results[other])
            shown = value / 1e6 if key == "flops" else value
            cells.append((form.format(shown), value == best))
        rows.append({"label": LABELS[name], "cells": cells})
    return rows


def verdict(results: dict[str, Any], saved: dict[str, dict[str, np.ndarray]] | None = None) -> str:
    """Plain sentences: does the student beat its control and its own self path, beyond chance?

    ``saved``: the predictions for each image; with them the errors are those of paired differences.
    """
    if CONTROL not in results:
        text = "No control was trained, so the effect of the graph is unknown."
    else:
        points, noise, how = _difference(results, saved or {}, CONTROL)
        beats, conclusion = "does not beat", "the graph hurts"
        if abs(points) <= 2 * noise or not points:
            conclusion = "a tie, the difference is within two standard errors"
        elif points > 0:
            beats, conclusion = "beats", "the graph helps"
        text = (
            f"The student {beats} its control (same stem and initial weights, MLP head, no graph "
            f"and no partitions in its order): {points:+.2f} points, standard error {noise:.2f} "
            f"({how}, one seed): {conclusion}."
        )
    if "self_path" in results:
        points, noise, how = _difference(results, saved or {}, "self_path")
        conclusion = "within" if abs(points) <= 2 * noise or not points else "beyond"
        text += (
            f" Against its own self path, the same weights without neighbors: {points:+.2f} "
            f"points, standard error {noise:.2f} ({how}): {conclusion} two standard errors."
        )
    return text


def _difference(
    results: dict[str, Any], saved: dict[str, dict[str, np.ndarray]], other: str
) -> tuple[float, float, str]:
    """Student minus another model in points, its standard error, and how that was estimated."""
    one, two = results["student"]["accuracy"], results[other]["accuracy"]
    mine, theirs = saved.get("student"), saved.get(other)
    if mine is not None and theirs is not None and np.array_equal(mine["ids"], theirs["ids"]):
        hit, met = (m["predicted"] == m["labels"] for m in (mine, theirs))
        gain = hit.astype(float) - met
        error = float(gain.std()) / math.sqrt(len(gain))
        return 100 * (one - two), 100 * error, f"paired, {len(gain):,} images"
    images = evaluated(results["student"]) or results["run"]["test_images"]
    # Evaluated on the same images but treated as independent: the error is an upper bound.
    error = math.sqrt((one * (1 - one) + two * (1 - two)) / images)
    return 100 * (one - two), 100 * error, f"binomial, {images:,} images"


def _left_out(results: dict[str, Any]) -> str | None:
    """What the table does not count, if anything."""
    left_out = results["student"].get("left_out")
    if not left_out:
        return None
    used = evaluated(results["student"]) or 0
    total = used + left_out  # more than test_images where pack left some out
    some = "; ".join(results["run"].get("left_out", []))
    return (
        f"{used:,} of {total:,} held-out images were evaluated. {left_out:,} can't be read and "
        f"count as neither right nor wrong: {some}"
    )


def confused_pairs(
    student: dict[str, np.ndarray] | None, names: Sequence[str]
) -> list[tuple[str, str, int]]:
    """The student's most frequent mistakes: true class, predicted class, images."""
    if student is None:
        return []
    # Counted where they occur: a full matrix of 20,000 classes takes gigabytes.
    wrong = student["labels"] != student["predicted"]
    flat = student["labels"][wrong] * len(names) + student["predicted"][wrong]
    pairs, counts = np.unique(flat, return_counts=True)
    shown = FEW_PAIRS if len(names) <= figures.NAMED_CLASSES else MANY_PAIRS
    top = np.argsort(-counts, kind="stable")[:shown]
    return [
        (names[pairs[i] // len(names)], names[pairs[i] % len(names)], int(counts[i])) for i in top
    ]


def _confusion(root: Path, student: dict[str, np.ndarray] | None, names: list[str]) -> str | None:
    """The plot, if there are few enough classes to tell apart; also written as a file."""
    count = len(names)
    if student is None or count > figures.MOST_CLASSES:
        return None
    flat = np.bincount(student["labels"] * count + student["predicted"], minlength=count**2)
    png = figures.confusion(flat.reshape(count, count), names)
    (root / "evaluation" / "confusion.png").write_bytes(png)
    return figures.uri(png)


def _curves(metrics: figures.Metrics) -> list[tuple[str, str]]:
    """Plots over epochs: their title and data URI."""
    drawn = [
        (title, figures.curve(metrics, key, title, share=share)) for key, title, share in CURVES
    ]
    return [(title, figures.uri(png)) for title, png in drawn if png is not None]


def _gallery(path: Path, names: list[str]) -> list[dict[str, Any]]:
    """Test images with the neighbors that they attached to."""
    if not path.exists():
        return []
    saved = np.load(path)
    cards = []
    for row in range(len(saved["images"])):
        near = [
            {
                "image": figures.picture(saved["neighbour_images"][row, slot]),
                "label": names[int(saved["neighbour_labels"][row, slot])],
                "weight": float(weight),
                "same": bool(saved["neighbour_labels"][row, slot] == saved["labels"][row]),
            }
            for slot, weight in enumerate(saved["weights"][row])
            if weight > 0
        ]
        cards.append(
            {
                "image": figures.picture(saved["images"][row]),
                "label": names[int(saved["labels"][row])],
                "predicted": names[int(saved["predicted"][row])],
                "confidence": float(saved["confidence"][row]),
                "right": bool(saved["labels"][row] == saved["predicted"][row]),
                "neighbours": near,
            }
        )
    return cards


def _speed(metrics: figures.Metrics) -> list[dict[str, Any]]:
    """Median throughput, median wait and highest memory of each training, where logged."""

    def logged(lines: list[dict[str, Any]], key: str) -> list[float]:
        return [line[key] for line in lines if line.get(key) is not None]

    rows = []
    for name, lines in metrics.items():
        speed, wait, memory = (
            logged(lines, key) for key in ("images_per_s", "wait_share", "memory_mb")
        )
        if speed and wait and memory:
            rows.append(
                {
                    "name": name,
                    "images_per_s": float(np.median(speed)),
                    "wait": float(np.median(wait)),
                    "memory": max(memory),
                    "slowest": _slowest(lines),
                }
            )
    return rows


def _slowest(lines: list[dict[str, Any]]) -> str:
    """The rank that most often was the slowest, and its median ratio then; empty for a single rank."""
    named = [line for line in lines if line.get("slowest") is not None]
    if not named:
        return ""
    counts = Counter((line["slowest_rank"], line.get("slowest_host", "")) for line in named)
    rank, host = counts.most_common(1)[0][0]
    ratio = np.median([line["slowest"] for line in named if line["slowest_rank"] == rank])
    return f"rank {rank}" + f" on {host}" * bool(host) + f", {ratio:.2f} ×"


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return durable.read_lines(path) if path.exists() else []


def _maybe(png: bytes | None) -> str | None:
    return None if png is None else figures.uri(png)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
