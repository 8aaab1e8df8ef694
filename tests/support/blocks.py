"""Blocks whose two hops are both sampled from a candidate table."""

from __future__ import annotations

import numpy as np

from cnn2gnn_dist.graph.block import BlockIds, block_ids, sampled_first_hop
from cnn2gnn_dist.graph.sampler import Sampler


def sampled_block(
    sampler: Sampler, seeds: np.ndarray, fanouts: tuple[int, int], **key: int
) -> BlockIds:
    first = sampled_first_hop(sampler, seeds, fanouts[0], **key)
    return block_ids(sampler, first, seeds, fanouts[1], **key)


def first_of(block: BlockIds) -> np.ndarray:
    """The seeds' candidates [B, F], as indices into V; -1: none."""
    return np.append(block.first_U, -1)[block.row_of_BF]
