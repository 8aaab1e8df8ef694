"""The second hop of all nodes, precomputed: it does not change between two refreshes.

Bank features and bank-to-bank weights are constants until the next refresh, so
m_j = Σ_l p_jl x_l over all candidates l of j can be computed once. A step then gathers two
vectors per neighbor, whatever the fan-out.

A seed i is taken out of the average of its neighbor j: (m_j − p_ji x_i) / (1 − p_ji). Where p_ji is near 1 (copies,
frames of a burst), a rounded m_j would leave nothing but rounding errors, so that average is kept without i as well.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.graph.bank import Bank
from cnn2gnn_dist.graph.block import without_seed
from cnn2gnn_dist.models.block import Block
from cnn2gnn_dist.models.gnn import ALONE
from cnn2gnn_dist.models.graph_head import adaptive_neighbours, squared_distances

ROWS = 4096
HEAVY = 0.75
"""Weight of a neighbor from which the average without it is kept: of half precision's 11 bits it would take 2."""


class CachedSecondHop:
    """m and p of every row that can be a first hop (inner and first-halo nodes).

    Args:
        bank: of this rank's partitions; rows of the second halo are not needed if ``everyone`` is given.
        k: neighbors with a weight above zero.
        kind: dtype of m: float16, as the features.
        everyone: the bank of all nodes, mapped: rows are read from it once, here.
    """

    def __init__(
        self,
        bank: Bank,
        k: int,
        kind: torch.dtype = torch.float16,
        everyone: Bank | None = None,
    ) -> None:
        rows, width = bank.table_KM.shape
        self.bank, self.table_KM = bank, bank.table_KM
        self.mean_KD = torch.zeros(rows, bank.x_LD.shape[1], dtype=kind)
        self.p_KM = torch.zeros(rows, width, dtype=bank.z_Ld.dtype)
        heavy, without = [], []
        k = max(1, min(k, width - 1))
        source = bank if everyone is None else everyone
        for start in range(0, rows, ROWS):
            own = torch.arange(start, min(start + ROWS, rows))
            table = torch.from_numpy(bank.table_KM[start : start + ROWS].astype(np.int64))
            present = (table >= 0) & (table != own[:, None])
            near = table.clamp(min=0).view(-1)
            if everyone is not None:
                near = torch.from_numpy(bank.nodes_L[near.numpy()]).long()
            z = source.z_Ld.index_select(0, near).view(*table.shape, -1)
            p = adaptive_neighbours(squared_distances(bank.z_Ld[own], z), k, present).p_BM
            x = source.x_LD.index_select(0, near).view(*table.shape, -1).to(p.dtype)
            self.p_KM[own] = p
            self.mean_KD[own] = torch.bmm(p.unsqueeze(1), x).squeeze(1).to(kind)
            most, column = p.max(1)
            at = (most > HEAVY).nonzero()[:, 0]
            heavy.append(own[at])
            without.append(_without(p[at], column[at], x[at]).to(kind))
        self.heavy_H = torch.cat(heavy).numpy() if heavy else np.empty(0, np.int64)
        self.without_HD = torch.cat(without) if without else self.mean_KD[:0]

    def block(self, first_BF: np.ndarray, seeds_B: np.ndarray) -> Block:
        """The block of seeds (local ids, -1 = unseen) with these candidates (-1 = none).

        Its first hop has one row per slot: seeds drawn from a large graph rarely share neighbors,
        and deduplicating them costs more than it saves. Empty slots have the row of node 0, which
        is never used.
        """
        first_BF = without_seed(first_BF, seeds_B)
        nodes_U = first_BF.clip(min=0).reshape(-1)
        x, z, labels = self.bank.rows(np.concatenate([nodes_U, np.maximum(seeds_B, 0)]))
        slots = len(nodes_U)
        mean = self.mean_KD.index_select(0, torch.from_numpy(nodes_U))
        back_BF = self._back(first_BF, seeds_B)
        taken = (back_BF.view(-1) > HEAVY).nonzero()[
            :, 0
        ]  # at most one neighbor of a row weighs as much
        place = np.searchsorted(self.heavy_H, nodes_U[taken.numpy()])
        mean[taken] = self.without_HD[torch.from_numpy(place)]
        back_BF.view(-1)[taken] = 0.0
        return Block(
            present_BF=torch.from_numpy(first_BF >= 0),
            row_of_BF=None,
            x_UD=x[:slots],
            z_Ud=z[:slots],
            labels_U=labels[:slots].long(),
            mean_UD=mean,
            back_BF=back_BF,
            seed_x_BD=x[slots:],
        )

    def _back(self, first_BF: np.ndarray, seeds_B: np.ndarray) -> Tensor:
        """p_ji [B, F]: 0 for unseen seeds, empty slots and seeds that are not among j's candidates."""
        seeds_B = np.where(seeds_B >= 0, seeds_B, -2)  # -1 would match empty cells
        rows = first_BF.clip(min=0)
        hit = (self.table_KM[rows] == seeds_B[:, None, None]) & (first_BF >= 0)[:, :, None]
        back = np.zeros(first_BF.shape, self.p_KM.numpy().dtype)
        b, f, m = np.nonzero(hit)  # few: a neighbor rarely has the seed among its own
        back[b, f] = self.p_KM.numpy()[rows[b, f], m]
        return torch.from_numpy(back)


def _without(p_HM: Tensor, column_H: Tensor, x_HMD: Tensor) -> Tensor:
    """The averages without the candidates in these columns; 0 where there is no other."""
    rest_HM = p_HM.scatter(1, column_H[:, None], 0.0)
    weight_H1 = rest_HM.sum(1, keepdim=True)
    rest_HM = torch.where(weight_H1 > ALONE, rest_HM / weight_H1.clamp(min=ALONE), 0.0)
    return torch.bmm(rest_HM.unsqueeze(1), x_HMD).squeeze(1)
