"""Blocks: what the student sees around the seed nodes of a batch, and the interface to build them.

Everything in a block is constant until the next refresh: rows of the bank, and a second hop averaged
with weights between rows of the bank. Only a seed's weights over its first hop are live.

Shapes: B seeds, F first-hop slots of a seed, U rows of the first hop, G second-hop slots of each,
V nodes of both hops; D features, d projection.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cnn2gnn_dist.models.graph_head import Neighbours, adaptive_neighbours


@dataclass
class Block:
    """Two hops around B seeds; the second hop is averaged, with the seeds still included.

    Attributes:
        present_BF: bool, whether a slot holds a candidate; the seed itself never does.
        row_of_BF: int64 into U, the candidate's row (arbitrary where none is present); None: each
            slot has its own row, and U is the B x F slots in order.
        x_UD, z_Ud: bank rows of the first hop, any float dtype.
        labels_U: int64, -1 = unknown.
        mean_UD: m_j = Σ_l p_jl x_l over the neighbors l of j, any float dtype.
        back_BF: p_ji, the weight that the first-hop node j gives to the seed i; 0 if none.
        seed_x_BD: the seeds' features as they went into mean_UD; arbitrary for an unseen image, to
            which no node gives a weight.
    """

    present_BF: Tensor
    row_of_BF: Tensor | None
    x_UD: Tensor
    z_Ud: Tensor
    labels_U: Tensor
    mean_UD: Tensor
    back_BF: Tensor
    seed_x_BD: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Block:
        """Return the block on a device; ``dtype`` applies to the float tensors."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                kind = dtype if value.is_floating_point() else None
                value = value.to(device, kind, non_blocking=True)
            moved[field.name] = value
        return Block(**moved)

    def in_slots(self, values_UX: Tensor) -> Tensor:
        """[B, F, ...]: the rows' values at the slots where they are candidates."""
        if self.row_of_BF is None:
            return values_UX.view(*self.present_BF.shape, *values_UX.shape[1:])
        if values_UX.dim() == 1:
            return values_UX[self.row_of_BF]
        return F.embedding(self.row_of_BF, values_UX)

    def first_labels_BF(self) -> Tensor:
        """Labels of the candidates; -1 = unknown or no candidate."""
        return torch.where(self.present_BF, self.in_slots(self.labels_U), -1)


class BlockQuery(Protocol):
    """Builder of a block that needs the seeds' projections first.

    The projection is computed inside the student's forward pass, where ZeRO-3 gathers its
    parameters, so the student requests the block during the pass. The stages pass it a query
    (``stages/neighbours/neighbourhood.py``) that knows the graph.
    """

    def block(self, z_Bd: Tensor) -> Block:
        """Return the block around the seeds, on any device; ``z_Bd`` carries no gradient."""


def averaged_block(
    x_VD: Tensor,
    z_Vd: Tensor,
    labels_V: Tensor,
    *,
    first_U: Tensor,
    row_of_BF: Tensor,
    second_UG: Tensor,
    seed_B: Tensor,
    k: int,
) -> Block:
    """Build the block of nodes whose second hop is given node by node.

    Args:
        x_VD: features of all nodes, rows of the bank; converted to the dtype of z.
        z_Vd: their projections.
        labels_V: int64, -1 = unknown.
        first_U: int64 into V, the nodes of the first hop, each once.
        row_of_BF: int64 into U, the seeds' candidates; -1 = none.
        second_UG: int64 into V, the candidates of each first-hop node; -1 = none.
        seed_B: int64 into V, the seeds' own rows; -1 for unseen images.
        k: neighbors of a first-hop node with a weight above zero.
    """
    if not len(first_U):  # all images are copies of each other: use one unreferenced node,
        first_U = first_U.new_zeros(1)  # since torch cannot gather from an empty table
        second_UG = second_UG.new_full((1, second_UG.shape[1]), -1)
        seed_B = torch.full_like(seed_B, -1)
        x_VD, z_Vd = x_VD.new_zeros(1, x_VD.shape[1]), z_Vd.new_zeros(1, z_Vd.shape[1])
        labels_V = labels_V.new_full((1,), -1)
    with torch.no_grad():
        x_VD = x_VD.to(z_Vd.dtype)
        there_BF, row_of_BF = row_of_BF >= 0, row_of_BF.clamp(min=0)
        z_Ud = rows(z_Vd, first_U)
        present_UG = (second_UG >= 0) & (second_UG != first_U.unsqueeze(1))
        # In place: allocating U·G·d differences costs more than computing them.
        apart_UGd = rows(z_Vd, second_UG).sub_(z_Ud.unsqueeze(1))
        p_UG = nearest(apart_UGd.square_().sum(-1), k, present_UG).p_BM
        mean_UD = F.embedding_bag(second_UG.clamp(min=0), x_VD, per_sample_weights=p_UG, mode="sum")
        # p_ji, wherever the seed i is among the candidates of its neighbor j. An unseen
        # image (-1) matches only empty slots (-1), whose weight is 0.
        is_seed_BFG = rows(second_UG, row_of_BF) == seed_B.view(-1, 1, 1)
        return Block(
            present_BF=there_BF & (first_U[row_of_BF] != seed_B.unsqueeze(1)),
            row_of_BF=row_of_BF,
            x_UD=rows(x_VD, first_U),
            z_Ud=z_Ud,
            labels_U=labels_V[first_U],
            mean_UD=mean_UD,
            back_BF=(rows(p_UG, row_of_BF) * is_seed_BFG).sum(-1),
            seed_x_BD=rows(x_VD, seed_B),
        )


def nearest(d_BM: Tensor, k: int, present_BM: Tensor) -> Neighbours:
    """``adaptive_neighbours`` with k, or fewer if there are not k+1 columns."""
    return adaptive_neighbours(d_BM, max(1, min(k, present_BM.shape[1] - 1)), present_BM)


def rows(table_VX: Tensor, ids: Tensor) -> Tensor:
    """Rows of constants, [*ids.shape, X]; -1 gives an arbitrary row. Takes a tenth of the time of indexing."""
    flat = table_VX.index_select(0, ids.clamp(min=0).reshape(-1))
    return flat.view(*ids.shape, table_VX.shape[-1])
