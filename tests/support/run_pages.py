"""A synthetic finished run, and its report page as a test reads it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

MODELS = ("teacher", "student", "self_path", "vote", "control_mlp")


class Page(HTMLParser):
    """Tables as lists of rows of text, bold cells, images, and everything that links elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.bold: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.pointers: list[str] = []
        self.tags: list[str] = []
        self._cell = self._best = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell, self._best = True, found.get("class") == "best"
        elif tag == "img":
            self.images.append(found)
        self.pointers += [found[k] for k in ("href", "src", "srcset", "action") if found.get(k)]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.tables[-1][-1][-1] += data.strip()
            if self._best:
                self.bold.append(data.strip())

    def table(self, first_header: str) -> list[list[str]]:
        return next(t for t in self.tables if first_header in t[0])


def scores(accuracy: float, parameters: int) -> dict:
    return {
        "accuracy": accuracy,
        "balanced_accuracy": accuracy - 0.01,
        "ece": 0.05,
        "parameters": parameters,
        "flops": 1e6 * parameters / 1000,
        "ms_per_image": parameters / 1e5,
        "ms_alone": parameters / 25e3,
    }


def make_run(root: Path, classes: int = 4, images: int = 200) -> Path:
    """A folder as the stages leave it, as far as the report reads it."""
    rng = np.random.default_rng(0)
    (root / "evaluation").mkdir(parents=True)
    table = {name: scores(0.9 - i / 50, 9000 - 1000 * i) for i, name in enumerate(MODELS)}
    del table["vote"]["ms_alone"]  # as an earlier version left it
    table["student"]["graph"] = {
        "nodes": 1234,
        "candidates": 16,
        "homophily": 0.875,
        "cut": 0.0123,
        "inner": [617, 617],
        "halo": [31, 45],
        "degree": {
            "min": 0,
            "median": 14.0,
            "max": 51,
            "histogram": {"from": [0, 1, 2, 4, 8], "nodes": [5, 29, 200, 500, 500]},
        },
    }
    table["run"] = {
        "name": "made <up>",
        "train_images": 1234,
        "test_images": images,
        "classes": classes,
        "device": "cpu",
        "ranks": 2,
        "seed": 0,
        "python": "3.11",
        "torch": "2.13",
    }
    (root / "results.json").write_text(json.dumps(table))
    for stage in ("teacher", "student", "control"):
        (root / stage).mkdir()
        lines = [
            {"step": s, "epoch": s / 4, "loss": 2 / s, "accuracy": 1 - 1 / s, "images_per_s": 100.0,
             "wait_share": 0.25, "memory_mb": 500.0 + s, "slowest": 1 + s / 8,
             "slowest_rank": min(s % 4, 1), "slowest_host": "node-b" if s % 4 else "node-a"} for s in range(1, 9)
        ]  # fmt: skip
        (root / stage / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    labels = rng.integers(0, classes, images)
    for name in MODELS:
        missed = rng.random(images) < 0.2
        predicted = np.where(missed, rng.integers(0, classes, images), labels)
        confidence = rng.random(images, dtype=np.float32)
        np.savez(
            root / "evaluation" / f"{name}.npz",
            ids=np.arange(images), predicted=predicted, confidence=confidence, labels=labels,
        )  # fmt: skip
    np.savez(
        root / "evaluation" / "gallery.npz",
        images=rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8),
        labels=np.array([0, 1, 2]),
        predicted=np.array([0, 3, 2]),
        confidence=np.array([0.9, 0.4, 0.7], np.float32),
        neighbour_images=rng.integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8),
        neighbour_labels=np.array([[0, 1], [3, 3], [2, 2]]),
        weights=np.array([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], np.float32),
    )
    (root / "config.yaml").write_text("name: made\nseed: 0\n")
    return root
