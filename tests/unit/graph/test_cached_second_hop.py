"""Averages of the second hop, computed once: what is left of them without the seed, however much it weighed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnn2gnn_dist.graph.bank import Bank
from cnn2gnn_dist.models.gnn import _without_seed
from cnn2gnn_dist.models.graph_head import adaptive_neighbours, squared_distances
from cnn2gnn_dist.stages.neighbours.second_hop import HEAVY, CachedSecondHop

N, D, K = 24, 40, 3


def close_pairs(gap: float) -> Bank:
    """Nodes 2i and 2i + 1 are apart by a gap, all others by about 1: each node's candidates are all the others."""
    gen = torch.Generator().manual_seed(3)
    z_Nd = torch.eye(N // 2).repeat_interleave(2, 0)
    z_Nd[1::2] += gap * torch.randn(N // 2, N // 2, generator=gen)
    table = np.stack([np.delete(np.arange(N), i) for i in range(N)]).astype(np.int32)
    x_ND = torch.randn(N, D, generator=gen).half()
    return Bank(
        x_ND, z_Nd, torch.zeros(N, dtype=torch.int32), np.arange(N, dtype=np.int32), N, table
    )


@pytest.mark.parametrize("gap", [0.5, 0.03, 0.001, 0.0])
def test_second_hops_without_the_seed_are_those_of_double_precision(gap: float) -> None:
    bank = close_pairs(gap)
    table = torch.from_numpy(bank.table_KM.astype(np.int64))
    z, x = bank.z_Ld.double(), bank.x_LD.double()
    p_NM = adaptive_neighbours(squared_distances(z, z[table]), K).p_BM
    hop = CachedSecondHop(bank, K)
    block = hop.block(bank.table_KM.astype(np.int64), np.arange(N))
    ours_BFD = _without_seed(
        block.in_slots(block.mean_UD).float(), block.back_BF, block.seed_x_BD.float()
    )
    heavy = 0
    for i in range(N):
        for f, j in enumerate(table[i].tolist()):
            others = table[j] != i
            heavy += int(p_NM[j][~others] > HEAVY)
            rest = p_NM[j][others]
            expected_D = (
                (rest / rest.sum()) @ x[table[j][others]] if rest.sum() > 1e-5 else 0 * x[0]
            )
            assert (ours_BFD[i, f] - expected_D).norm() <= 3e-3 * expected_D.norm(), (i, j)
    assert len(hop.heavy_H) == heavy
    assert gap > 0.1 or heavy == N


def test_unseen_images_get_the_averages_with_all_neighbours() -> None:
    bank = close_pairs(0.01)
    hop = CachedSecondHop(bank, K)
    first = np.arange(N)[None].astype(np.int64)
    block = hop.block(first, np.array([-1]))
    assert torch.equal(block.mean_UD, hop.mean_KD)
    assert not block.back_BF.any()
