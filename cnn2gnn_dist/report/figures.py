"""The pictures of the report, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cnn2gnn_dist.report.labels import short

Metrics = dict[str, list[dict[str, Any]]]

COLOURS = {
    "teacher": "#7a5195",
    "student": "#0b6e99",
    "self path": "#4aa3a2",
    "vote": "#8a8f3c",
    "control": "#ef8a17",
}
HELD_OUT = {"test_accuracy": ("o", "held-out"), "self_path_test_accuracy": ("x", "self path")}
MOST_CLASSES, NAMED_CLASSES, COUNTED_CLASSES = 1000, 100, 30
"""Numbers of classes up to which the confusion matrix is drawn, shows names, shows counts."""
LONGEST_NAME = 18
ECE_BINS = 15


def uri(png: bytes) -> str:
    """PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def picture(image_HWC: np.ndarray) -> str:
    """A small uint8 image as a data URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return uri(file.getvalue())


def curve(metrics: Metrics, key: str, title: str, *, share: bool = False) -> bytes | None:
    """One value of each training over its epochs, PNG; None if it was never logged.

    ``share``: the value is a fraction of one, shown in percent. Accuracy curves show the held-out
    evaluations as dots.
    """
    figure, axis = _axes(title)
    drawn = False
    for name, lines in metrics.items():
        drawn |= _line(axis, lines, key, label=name, color=COLOURS.get(name), linewidth=1.4)
        for held_out_key, (marker, what) in HELD_OUT.items() if key == "accuracy" else ():
            form = {"marker": marker, "linestyle": "", "color": COLOURS.get(name)}
            drawn |= _line(axis, lines, held_out_key, label=f"{name}, {what}", **form)
    if not drawn:
        plt.close(figure)
        return None
    axis.set_xlabel("epoch")
    axis.set_ylim(bottom=0)
    if share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(axis.lines) > 1:
        # A light background: throughput varies so much that no corner is sure to be free.
        axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)
    return _png(figure)


def homophily(lines: list[dict[str, Any]]) -> bytes | None:
    """Weighted share of the seeds' same-class neighbors over epochs, PNG."""
    title = "weight on same-class neighbors (seeds)"
    return curve({"student": lines}, "homophily", title, share=True)


def degrees(histogram: dict[str, list[int]]) -> bytes:
    """In-degrees of the final graph, PNG."""
    figure, axis = _axes("how often a node is a candidate (in-degree)")
    starts = histogram["from"]
    ends = [*(start - 1 for start in starts[1:]), None]
    names = [
        f"{low}+" if high is None else str(low) if high <= low else f"{low}–{high}"
        for low, high in zip(starts, ends, strict=True)
    ]
    axis.bar(names, histogram["nodes"], color=COLOURS["student"])
    axis.set_ylabel("nodes")
    axis.grid(visible=False, axis="x")
    return _png(figure)


def confusion(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    """Confusion matrix with recall as color, PNG; names and counts where there is room.

    Cost is bounded: beyond ``NAMED_CLASSES`` the picture has one size, and numbers on its axes.
    """
    count = len(matrix)
    few, named = count <= COUNTED_CLASSES, count <= NAMED_CLASSES
    side = 2.4 + 0.36 * count if few else 2.4 + 0.136 * count if named else 10.0
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    share = (matrix / np.maximum(matrix.sum(1, keepdims=True), 1)).astype(np.float32)
    # With many classes a cell is a pixel: the root makes rare mistakes visible.
    norm = PowerNorm(1.0 if named else 0.5, vmin=0, vmax=1)
    axis.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
    axis.set_xlabel("predicted" if named else "predicted (class number)")
    axis.set_ylabel("true class" if named else "true class (number)")
    if named:
        _name_classes(axis, names[:count], few)
    for row, column in np.argwhere(matrix > 0) if few else ():
        ink = "white" if share[row, column] > 0.5 else "black"
        number = str(matrix[row, column])
        axis.text(column, row, number, ha="center", va="center", fontsize=8, color=ink)
    return _png(figure)


def _name_classes(axis: Axes, names: Sequence[str], few: bool) -> None:
    shown, size = [_plain(name) for name in names], 9.0 if few else 6.5
    short = max(map(len, shown)) <= 2
    rotation: dict[str, Any] = {} if short and few else {"rotation": 60 if few else 90}
    align: dict[str, Any] = {"ha": "right", "rotation_mode": "anchor"} if rotation and few else {}
    axis.set_xticks(range(len(shown)), shown, fontsize=size, **rotation, **align)
    axis.set_yticks(range(len(shown)), shown, fontsize=size)


def reliability(saved: dict[str, dict[str, np.ndarray]]) -> bytes:
    """Accuracy against confidence in equal-width bins, PNG; a dot's area is its image count."""
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    for name, found in saved.items():
        bins = np.minimum((found["confidence"] * ECE_BINS).astype(int), ECE_BINS - 1)
        right = found["predicted"] == found["labels"]
        used = [b for b in range(ECE_BINS) if (bins == b).any()]
        sure = [found["confidence"][bins == b].mean() for b in used]
        hit = [right[bins == b].mean() for b in used]
        area = [4 + 150 * float((bins == b).mean()) for b in used]
        model = short(name)
        axis.plot(sure, hit, linewidth=1.2, label=model, color=COLOURS.get(model))
        axis.scatter(sure, hit, s=area, color=COLOURS.get(model), alpha=0.8)
    axis.set_xlabel("confidence")
    axis.set_ylabel("accuracy")
    axis.set_title("calibration")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return _png(figure)


def _axes(title: str) -> tuple[Figure, Axes]:
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    return figure, axis


def _line(axis: Axes, lines: list[dict[str, Any]], key: str, **form: Any) -> bool:
    """Draw what was logged under a key; returns whether anything was. Non-finite is null there."""
    points = [(line["epoch"], line[key]) for line in lines if line.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **form)
    return bool(points)


def _plain(name: str) -> str:
    """A class name as a label: matplotlib would read dollar signs as formulas."""
    short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return short.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return file.getvalue()
