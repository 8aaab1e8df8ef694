"""The pictures of the report, as data URIs."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

COLOURS = {"teacher": "#7a5195", "student": "#0b6e99", "control": "#ef8a17"}
MOST_CLASSES = 100
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


def curves(metrics: dict[str, list[dict[str, Any]]]) -> bytes:
    """Loss and accuracy of each training over its epochs, PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for name, lines in metrics.items():
        for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            if points:
                epochs, values = zip(*points, strict=True)
                axis.plot(epochs, values, label=name, color=COLOURS.get(name), linewidth=1.4)
        for key in ("test_accuracy", "self_path_test_accuracy"):
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            if points:
                axes[1].plot(*zip(*points, strict=True), "o", color=COLOURS.get(name))
    for axis, title in zip(axes, ("training loss", "training accuracy"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    return _png(figure)


def homophily(lines: list[dict[str, Any]]) -> bytes | None:
    """Weighted share of same-class neighbours of the seeds over epochs, PNG."""
    points = [(line["epoch"], line["homophily"]) for line in lines if "homophily" in line]
    if not points:
        return None
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    axis.plot(*zip(*points, strict=True), color=COLOURS["student"])
    axis.set_title("weight on same-class neighbours (seeds)")
    axis.set_xlabel("epoch")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    return _png(figure)


def degrees(histogram: dict[str, list[int]]) -> bytes:
    """In-degrees of the final graph, PNG."""
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    names = [f"{start}+" if start > 1 else str(start) for start in histogram["from"]]
    axis.bar(names, histogram["nodes"], color=COLOURS["student"])
    axis.set_title("how often a node is a candidate (in-degree)")
    axis.set_ylabel("nodes")
    axis.tick_params(axis="x", labelsize=8)
    return _png(figure)


def confusion(matrix: np.ndarray, names: list[str]) -> bytes:
    """Confusion matrix with recall as colour, PNG; names and counts where there is room."""
    count = len(matrix)
    side = min(12.0, 2.5 + 0.42 * count)
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true class")
    if count <= 30:
        axis.set_xticks(range(count), names, rotation=60, ha="right")
        axis.set_yticks(range(count), names)
        for row, column in np.argwhere(matrix > 0):
            dark = share[row, column] > 0.5
            axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
    return _png(figure)


def reliability(saved: dict[str, dict[str, np.ndarray]]) -> bytes:
    """Accuracy against confidence in equal-width bins, PNG."""
    figure, axis = plt.subplots(figsize=(4, 4), layout="constrained")
    axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    for name, found in saved.items():
        bins = np.minimum((found["confidence"] * ECE_BINS).astype(int), ECE_BINS - 1)
        right = found["predicted"] == found["labels"]
        used = [b for b in range(ECE_BINS) if (bins == b).any()]
        axis.plot(
            [found["confidence"][bins == b].mean() for b in used],
            [right[bins == b].mean() for b in used],
            "o-",
            markersize=3,
            label=name,
            color=COLOURS.get(name.split("_")[0]),
        )
    axis.set_xlabel("confidence")
    axis.set_ylabel("accuracy")
    axis.set_title("calibration")
    axis.legend(frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return file.getvalue()
