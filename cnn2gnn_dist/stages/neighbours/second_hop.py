"""The second hop of all nodes, precomputed: it does not change between two refreshes.

Bank features and bank-to-bank weights are constants until the next refresh, so
m_j = Σ_l p_jl x_l over all candidates l of j can be computed once. A step then gathers two
vectors per neighbor, whatever the fan-out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.graph.bank import Bank
from cnn2gnn_dist.graph.block import without_seed
from cnn2gnn_dist.models.block import Block
from cnn2gnn_dist.models.graph_head import adaptive_neighbours, squared_distances

ROWS = 4096


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
        return Block(
            present_BF=torch.from_numpy(first_BF >= 0),
            row_of_BF=None,
            x_UD=x[:slots],
            z_Ud=z[:slots],
            labels_U=labels[:slots].long(),
            mean_UD=self.mean_KD.index_select(0, torch.from_numpy(nodes_U)),
            back_BF=self._back(first_BF, seeds_B),
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
