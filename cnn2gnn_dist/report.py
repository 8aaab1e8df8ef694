"""The page people look at: ``report.html``, one self-contained file of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from cnn2gnn_dist import report_figures as figures

TEMPLATE = "report.html.j2"
MODELS = {"teacher": "teacher", "student": "student (graph)", "control_mlp": "control (MLP head)"}
COLUMNS = (
    ("accuracy", "accuracy", "{:.2%}", max),
    ("balanced_accuracy", "class-balanced", "{:.2%}", max),
    ("ece", "calibration error", "{:.3f}", min),
    ("parameters", "parameters", "{:,}", min),
    ("flops", "MFLOP / image", "{:.2f}", min),
    ("ms_per_image", "ms / image", "{:.3f}", min),
)


def write_report(root: Path, class_names: Sequence[str]) -> Path:
    """Write ``report.html`` and ``evaluation/confusion.png`` of a finished run; the page's path.

    What a run does not have (graph, control, gallery) is left out.
    """
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    metrics = {name: _metrics(root / name) for name in ("teacher", "student", "control")}
    metrics = {name: lines for name, lines in metrics.items() if lines}
    saved = {
        name: dict(np.load(root / "evaluation" / f"{name}.npz"))
        for name in MODELS
        if (root / "evaluation" / f"{name}.npz").exists()
    }
    confusion, pairs = _confusion(root, saved["student"], list(class_names))
    graph = results["student"].get("graph")
    page = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            run=results["run"],
            header=[title for _, title, _, _ in COLUMNS],
            rows=table_rows(results),
            verdict=verdict(results),
            curves=figures.uri(figures.curves(metrics)),
            speed=_speed(metrics),
            graph=graph,
            degrees=figures.uri(figures.degrees(graph["degree"]["histogram"])) if graph else None,
            homophily=_maybe(figures.homophily(metrics.get("student", []))),
            confusion=confusion,
            pairs=pairs,
            reliability=figures.uri(figures.reliability(saved)),
            gallery=_gallery(root / "evaluation" / "gallery.npz", list(class_names)),
            config=(root / "config.yaml").read_text(encoding="utf-8"),
        )
    )
    path = root / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def table_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: label and cells (text, whether it is the best of its column)."""
    there = [name for name in MODELS if name in results]
    rows = []
    for name in there:
        cells = []
        for key, _, form, better in COLUMNS:
            value = results[name][key]
            best = better(results[other][key] for other in there)
            shown = value / 1e6 if key == "flops" else value
            cells.append((form.format(shown), value == best))
        rows.append({"label": MODELS[name], "cells": cells})
    return rows


def verdict(results: dict[str, Any]) -> str:
    """One plain sentence: does the graph pay, and is the difference more than chance?"""
    if "control_mlp" not in results:
        return "No control was trained, so what the graph adds is not known."
    student, control = results["student"]["accuracy"], results["control_mlp"]["accuracy"]
    images = results["run"]["test_images"]
    # Both judged on the same images: taken as independent, the error is an upper bound.
    error = math.sqrt((student * (1 - student) + control * (1 - control)) / images)
    points, noise = 100 * (student - control), 100 * error
    if abs(points) <= 2 * noise:
        told = "a tie: the difference is within two standard errors"
    else:
        told = "the graph pays" if points > 0 else "the graph costs accuracy"
    return (
        f"Student minus control (same stem, MLP head, no graph): {points:+.2f} points, "
        f"standard error {noise:.2f} (one seed): {told}."
    )


def _confusion(
    root: Path, student: dict[str, np.ndarray], names: list[str]
) -> tuple[str | None, list[tuple[str, str, int]]]:
    """The picture (up to 100 classes) and the most confused pairs (true, predicted, images)."""
    count = len(names)
    flat = np.bincount(student["labels"] * count + student["predicted"], minlength=count**2)
    matrix = flat.reshape(count, count)
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    top = np.argsort(-wrong, axis=None, kind="stable")[:8]
    pairs = [
        (names[i // count], names[i % count], int(wrong.flat[i])) for i in top if wrong.flat[i]
    ]
    if count > figures.MOST_CLASSES:
        return None, pairs
    png = figures.confusion(matrix, names)
    (root / "evaluation" / "confusion.png").write_bytes(png)
    return figures.uri(png), pairs


def _gallery(path: Path, names: list[str]) -> list[dict[str, Any]]:
    """Test images with the neighbours they attached to."""
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


def _speed(metrics: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Median throughput, wait and memory of each training."""
    rows = []
    for name, lines in metrics.items():
        steps = [line for line in lines if "images_per_s" in line]
        if steps:
            rows.append(
                {
                    "name": name,
                    "images_per_s": float(np.median([s["images_per_s"] for s in steps])),
                    "wait": float(np.median([s["wait_share"] for s in steps])),
                    "memory": max(s["memory_mb"] for s in steps),
                }
            )
    return rows


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # a last line cut off by a kill
    return lines


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
