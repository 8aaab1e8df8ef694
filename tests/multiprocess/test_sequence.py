"""The sequence of global batches is independent of ranks, readers, backends and accumulation: across processes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tests.unit.data.test_sequence import (  # noqa: F401 (fixtures)
    SHARDS,
    Case,
    Data,
    Way,
    assert_wanted,
    data,
    places_of,
    run,
    shards,
)

LOCAL = [
    Way(1, 1, 1),
    Way(1, 16, 24, prefetch=20),
    Way(2, 3, 4),
    Way(4, 1, 2, prefetch=1),
    Way(4, 16, 1),
    Way(8, 3, 1),
    Way(8, 1, 3, prefetch=9),
]


RAY = [  # only a few: each reader is a process that takes 3 s of processor time to start
    ("parts", Way(2, 1, 2, "ray")),
    ("whole", Way(2, 3, 4, "ray")),
    ("whole", Way(1, 5, 12, "ray", prefetch=16)),
]
PROCESSES = [  # few, too
    ("parts", Way(2, 2, 2, "processes")),
    ("whole", Way(4, 1, 3, "processes", prefetch=9)),
    ("whole", Way(1, 5, 12, "processes", prefetch=16)),
]


@pytest.mark.parametrize(
    ("data", "way"),
    [
        *itertools.product(("whole", "parts"), LOCAL),
        *PROCESSES,
        *(pytest.param(*case, marks=pytest.mark.ray) for case in RAY),
    ],
    indirect=["data"],
    ids=str,
)
def test_the_bytes_are_the_same_any_way(data, way, request):
    if way.backend == "ray":
        request.getfixturevalue("ray_cluster")
    order = data.case.order()
    rows = [len(order.rank_batch(0, 0, rank, way.world)) for rank in range(way.world)]
    way = replace(way, accumulation=min(way.accumulation, *rows, 99))
    last = order.batches_per_epoch
    places = [(e, i) for e in (0, 1) for i in range(last)]  # across the epoch's end
    assert_wanted(data, places, run(data, way, places))
