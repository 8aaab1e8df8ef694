"""Blocks: the nodes two hops around seeds, and who is whose candidate, as indices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cnn2gnn_dist.graph.sampler import Sampler


@dataclass
class BlockIds:
    """A block without features.

    Attributes:
        nodes_V: int64 local ids of all nodes, distinct, ascending.
        first_BF: int64 into V, the seeds' candidates; -1 = none.
        unique_U: int64 into V, the distinct nodes of ``first_BF``.
        unique_of_BF: int64 into U; -1 = none.
        second_UG: int64 into V, the candidates of each unique node; -1 = none.
        seed_V: int64 [B] into V, the seed's own row; -1 for an unseen image.
    """

    nodes_V: np.ndarray
    first_BF: np.ndarray
    unique_U: np.ndarray
    unique_of_BF: np.ndarray
    second_UG: np.ndarray
    seed_V: np.ndarray


def sampled_block(
    sampler: Sampler,
    seeds_B: np.ndarray,
    fanouts: tuple[int, int],
    *,
    epoch: int,
    step: int,
    rank: int,
) -> BlockIds:
    """Both hops sampled from the candidate table."""
    distinct, place = np.unique(seeds_B, return_inverse=True)
    first = sampler.neighbours(distinct, fanouts[0], epoch=epoch, step=step, hop=1, rank=rank)
    return queried_block(
        sampler, first[place], seeds_B, fanouts[1], epoch=epoch, step=step, rank=rank
    )


def queried_block(
    sampler: Sampler,
    first_BF: np.ndarray,
    seeds_B: np.ndarray,
    fanout: int,
    *,
    epoch: int,
    step: int,
    rank: int,
) -> BlockIds:
    """First hop given (found by a search), second hop sampled.

    First-hop nodes without a row in the sampler's table (second halo) get no second hop.
    A seed (>= 0) is taken out of its own candidates; unseen images have seed -1.
    """
    first = np.where(first_BF == np.asarray(seeds_B)[:, None], -1, first_BF).astype(np.int64)
    unique = np.unique(first)
    unique = unique[unique >= 0]
    reached = unique < sampler.num_rows
    found = sampler.neighbours(unique[reached], fanout, epoch=epoch, step=step, hop=2, rank=rank)
    second = np.full((len(unique), found.shape[1]), -1, np.int64)
    second[reached] = found
    nodes = np.unique(np.concatenate([unique, second.ravel(), np.asarray(seeds_B, np.int64)]))
    nodes = nodes[nodes >= 0]
    return BlockIds(
        nodes_V=nodes,
        first_BF=_where(nodes, first),
        unique_U=np.searchsorted(nodes, unique),
        unique_of_BF=_where(unique, first),
        second_UG=_where(nodes, second),
        seed_V=_where(nodes, np.asarray(seeds_B, np.int64)),
    )


def _where(sorted_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Places of ids in an ascending array; -1 stays -1."""
    return np.where(ids < 0, -1, np.searchsorted(sorted_ids, ids))
