"""The student's two-layer GNN over a sparse, learned, row-stochastic graph.

    h¹_i = φ(A₁ x_i + g₁ ⊙ B₁ Σ_j p_ij x_j)
    y_i  = A₂ h¹_i + g₂ ⊙ B₂ Σ_j p_ij [h¹_j, ℓ_j]

Shapes: B seeds, F first-hop slots, U rows of the first hop, D features, H hidden, C classes,
E label embedding. ``j|i`` is node j as seed i sees it: with i removed from j's neighbors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.models.block import Block

ALONE = 1e-5  # if j's neighbors other than the seed weigh less than this, j has no others


class TwoLayerGNN(nn.Module):
    """Self path A₂ φ(A₁ x), a complete MLP, and a gated path through the neighbors.

    The gates start at 0, so the model starts as its own self path. Labels enter on the last
    hop only, so that no seed can see its own label through a first-layer state.

    Args:
        dim, hidden, num_classes: D, H, C.
        label_dim: E; 0: no labels.
        graph: False: only the self path (the control), without any graph parameter.
    """

    def __init__(
        self, dim: int, hidden: int, num_classes: int, label_dim: int = 0, *, graph: bool = True
    ) -> None:
        super().__init__()
        self.graph = graph
        self.label_dim = label_dim if graph else 0
        self.self1 = nn.Linear(dim, hidden)  # A₁
        self.self2 = nn.Linear(hidden, num_classes)  # A₂
        if not graph:
            return
        self.neighbour1 = nn.Linear(dim, hidden, bias=False)  # B₁
        self.neighbour2 = nn.Linear(hidden + label_dim, num_classes, bias=False)  # B₂
        self.gate1 = nn.Parameter(torch.zeros(hidden))
        self.gate2 = nn.Parameter(torch.zeros(num_classes))
        if label_dim:
            self.label = nn.Embedding(num_classes, label_dim)

    def forward(
        self, x_BD: Tensor, p: Tensor | None = None, block: Block | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits with the graph and logits of the self path alone: two [B, C].

        Args:
            x_BD: live features of the seeds.
            p: row-stochastic weights: [B, F] over the slots of the block (``dataset`` scope; 0
                where none is present), or without a block [B, B] among the seeds themselves
                (``batch`` scope). None: both results are the self path, and every graph
                parameter gets a zero gradient, so that ZeRO and DDP find no unused parameters.
            block: contents of the slots; all floats have one dtype.

        Everything goes through this method and the submodules' own ``forward``, because that is
        where ZeRO-3 gathers parameters.
        """
        a_BH = self.self1(x_BD)
        self_BH = F.relu(a_BH)
        self_logits_BC = self.self2(self_BH)
        if not self.graph:
            return self_logits_BC, self_logits_BC
        if p is None:
            idle = self._idle(x_BD[:1], self_BH[:1])
            return self_logits_BC + 0.0 * idle, self_logits_BC
        if block is not None:
            return self._over_block(a_BH, p, block), self_logits_BC
        return self._over_batch(x_BD, a_BH, p), self_logits_BC

    def _over_block(self, a_BH: Tensor, p_BF: Tensor, block: Block) -> Tensor:
        mean_x_BD = _average(p_BF, block.in_slots(block.x_UD))
        h_BH = F.relu(a_BH + self.gate1 * self.neighbour1(mean_x_BD))

        around_BFH = self._around(block)
        h_BFH = F.relu(block.in_slots(self.self1(block.x_UD)) + self.gate1 * around_BFH)

        message_BH = _average(p_BF, h_BFH)
        if self.label_dim:
            label_BE = _average(p_BF, block.in_slots(self._label(block.labels_U)))
            message_BH = torch.cat([message_BH, label_BE.to(message_BH.dtype)], 1)
        return self.self2(h_BH) + self.gate2 * self.neighbour2(message_BH)

    def _around(self, block: Block) -> Tensor:
        """B₁ m_{j|i} [B, F, H]; B₁ is linear, so the seed is subtracted wherever that is cheaper.

        Under autocast it is subtracted from the constants: of two products of 8 bits the difference may have none.
        """
        low = torch.is_autocast_enabled(block.mean_UD.device.type)
        if block.row_of_BF is None or low:
            mean_BFD = block.in_slots(block.mean_UD)
            rest_BFD = _without_seed(mean_BFD, block.back_BF, block.seed_x_BD)
            return self.neighbour1(rest_BFD)
        around_BFH = block.in_slots(self.neighbour1(block.mean_UD))
        return _without_seed(around_BFH, block.back_BF, self.neighbour1(block.seed_x_BD))

    def _over_batch(self, x_BD: Tensor, a_BH: Tensor, p_BB: Tensor) -> Tensor:
        """P(P·) over the mini-batch, zero diagonal, no labels."""
        h_BH = F.relu(a_BH + self.gate1 * self.neighbour1(_weighted(p_BB, x_BD)))
        message_BH = _weighted(p_BB, h_BH)
        if self.label_dim:
            # No labels here, but the embedding table must not count as unused.
            none_B = torch.full((len(x_BD),), -1, device=x_BD.device)
            label_BE = self._label(none_B).to(message_BH.dtype)
            message_BH = torch.cat([message_BH, label_BE], 1)
        return self.self2(h_BH) + self.gate2 * self.neighbour2(message_BH)

    def _label(self, labels: Tensor) -> Tensor:
        return self.label(labels.clamp(min=0)) * (labels >= 0).unsqueeze(1)

    def _idle(self, x_1D: Tensor, h_1H: Tensor) -> Tensor:
        message_1H = h_1H
        if self.label_dim:
            label_1E = self._label(torch.zeros(len(x_1D), dtype=torch.int64, device=x_1D.device))
            message_1H = torch.cat([h_1H, label_1E.to(h_1H.dtype)], 1)
        touched = self.neighbour1(x_1D).sum() + self.neighbour2(message_1H).sum()
        return touched + self.gate1.sum() + self.gate2.sum()


def _average(p_BF: Tensor, values_BFX: Tensor) -> Tensor:
    # Not a matmul: autocast would round the weights to 8 bits.
    return (p_BF.unsqueeze(-1) * values_BFX).sum(1)


def _weighted(p_BB: Tensor, values_BX: Tensor) -> Tensor:
    # In the precision of the weights: autocast would round them, and their gradients, to 8 bits.
    with torch.autocast(p_BB.device.type, enabled=False):
        return (p_BB @ values_BX.to(p_BB.dtype)).to(values_BX.dtype)


def _without_seed(b_BFH: Tensor, back_BF: Tensor, c_BH: Tensor) -> Tensor:
    """B₁ m_{j|i} = (B₁ m_j − p_ji B₁ u_i) / (1 − p_ji); 0 where j has no neighbor except i."""
    back_BF1 = back_BF.unsqueeze(-1)
    alone_BF1 = back_BF1 > 1.0 - ALONE
    rest_BF1 = torch.where(alone_BF1, 1.0, 1.0 - back_BF1)
    return torch.where(alone_BF1, 0.0, (b_BFH - back_BF1 * c_BH.unsqueeze(1)) / rest_BF1)
