"""What the student's training says when partitions give a rank larger micro-batches than it may hold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from cnn2gnn_dist import settings
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.stages.student import _GraphSchedule


def test_it_is_said_once_for_graphs_that_divide_images_alike() -> None:
    given = ["student.global_batch=64", "student.max_micro_batch=32"]
    said: list[str] = []
    context = SimpleNamespace(
        config=settings.load("demo", given),
        ranks=SimpleNamespace(world_size=2),
        warn=lambda text, stage: said.append(text),
    )
    schedule = _GraphSchedule(context, SimpleNamespace(accumulation=1), None)
    counts = [600, 600]

    def order(manifest: object, **how: int) -> Order:
        parts = np.split(np.arange(1200), [counts[0]])
        return Order(np.array([1200]), **how, parts=parts)

    schedule.around = SimpleNamespace(order=order)
    schedule.begin_epoch(0, "batch")
    assert not said
    counts[0] = 900  # a new graph
    for epoch in (1, 2):
        schedule.begin_epoch(epoch, "batch")
    assert len(said) == 1
    assert said[0].startswith("rank 0 holds 48 images at once, more than 32: ")
    assert said[0].endswith("(student.max_micro_batch, graph.partition.parts)")
