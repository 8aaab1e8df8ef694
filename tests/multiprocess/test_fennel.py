"""The streaming partitioner, and what a refresh moves: across processes."""

from __future__ import annotations

import numpy as np
import pytest

from cnn2gnn_dist.graph.partition import fennel
from cnn2gnn_dist.graph.partition import parts as partition
from tests.unit.graph.test_fennel import N, clustered


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_cuts_little_and_keeps_balance(parts: int) -> None:
    table, order = clustered()
    part = fennel.assign_streaming(table, order, parts)
    sizes = np.bincount(part, minlength=parts)
    assert len(sizes) == parts
    assert sizes.max() <= (1 + fennel.SLACK) * N / parts
    cut = partition.edge_cut(table, part)
    assert cut <= 1.3 * partition.edge_cut(table, partition.assign(table, parts)) + 1e-9
    np.testing.assert_array_equal(part, fennel.assign_streaming(table, order, parts))
