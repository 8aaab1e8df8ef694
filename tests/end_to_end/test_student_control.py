"""Student and control are identical in everything that the graph does not force to be different."""

from __future__ import annotations

import json
from pathlib import Path

KEYS = ("step", "epoch", "loss", "accuracy", "lr")


def lines(stage: Path) -> list[dict[str, float]]:
    text = (stage / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


def test_they_are_one_training_until_the_graph_begins(micro_run: Path) -> None:
    """On two ranks, bit-identical: initial weights, norms, order, views, targets, loss, clipping."""
    student, control = lines(micro_run / "student"), lines(micro_run / "control")
    warm = [line for line in student if line["epoch"] <= 1.0]  # graph.start_epoch
    assert len(warm) >= 5
    for ours, theirs in zip(warm, control, strict=False):
        assert [ours[key] for key in KEYS] == [theirs[key] for key in KEYS]
    assert not any("graph_lr" in line for line in warm)
    with_graph = student[len(warm) :]
    assert with_graph[0]["graph_lr"] < with_graph[3]["graph_lr"] <= with_graph[3]["lr"]
    assert [line["lr"] for line in with_graph] == [line["lr"] for line in control[len(warm) :]]
