"""The student: stem, graph head and two-layer GNN, in one of three scopes.

Shapes: B seeds, F first-hop candidates of a seed, U unique first-hop nodes, G second-hop
candidates of each, V nodes of the block; D features, d projection, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.gnn import NeighbourBlock, TwoLayerGNN
from cnn2gnn_dist.models.graph_head import (
    GraphHead,
    Neighbours,
    adaptive_neighbours,
    pairwise_squared_distances,
    squared_distances,
)
from cnn2gnn_dist.models.normalise import Normalise

Scope = Literal["none", "batch", "dataset"]


@dataclass
class SecondHop:
    """What the second hop comes to when bank features and bank-to-bank weights are constants.

    Attributes:
        mean_UD: m_j = Σ_l p_jl x_l of the unique first-hop nodes, any float dtype.
        back_BF: p_ji, the weight that the first-hop node j gives to the seed i; 0 if none.
    """

    mean_UD: Tensor
    back_BF: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> SecondHop:
        """The same on a device."""
        return SecondHop(
            self.mean_UD.to(device, non_blocking=non_blocking),
            self.back_BF.to(device, non_blocking=non_blocking),
        )


@dataclass
class CandidateBlock:
    """Candidates around B seeds, two hops, with the bank's rows of all nodes concerned.

    Attributes:
        x_VD, z_Vd: bank rows, any float dtype; constants until the next refresh.
        labels_V: int64, -1 = unknown.
        first_BF: int64 into V, the seeds' candidates; -1 = none.
        unique_U: int64 into V, the distinct nodes of first_BF.
        unique_of_BF: int64 into U, which of them lies in a slot; -1 = none.
        second_UG: int64 into V, the candidates of each unique node; -1 = none.
        seed_V: int64 [B] into V, the seed's own row; -1 for an unseen image.
        second: the second hop, already averaged; None: from second_UG. With it V begins with the
            B x F slots, row by row.
    """

    x_VD: Tensor
    z_Vd: Tensor
    labels_V: Tensor
    first_BF: Tensor
    unique_U: Tensor
    unique_of_BF: Tensor
    second_UG: Tensor
    seed_V: Tensor
    second: SecondHop | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> CandidateBlock:
        """The same block on a device."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=non_blocking)
            for name, value in values
        }
        return CandidateBlock(**moved)

    def first_labels_BF(self) -> Tensor:
        """Labels of the seeds' candidates, -1 = unknown, none there, or the seed itself."""
        present_BF = self._present_BF()
        return torch.where(present_BF, self.labels_V[self.first_BF.clamp(min=0)], -1)

    def _present_BF(self) -> Tensor:
        return (self.first_BF >= 0) & (self.first_BF != self.seed_V.unsqueeze(1))


@dataclass
class StudentOutput:
    """What a forward pass gives.

    Attributes:
        logits_BC, self_logits_BC: with the graph, and of the self path alone.
        x_BD, z_Bd: features and projection: the rows of the next bank.
        weights_BF: p_ij over the candidates ([B, B] in ``batch`` scope); None without a graph.
        first_labels_BF: labels of the candidates, -1 = unknown; ``dataset`` scope only.
        degenerate: int tensor [], rows of p without a spread of distances.
        scale: float tensor [], median S over the other rows; 0 if there are none.
    """

    logits_BC: Tensor
    self_logits_BC: Tensor
    x_BD: Tensor
    z_Bd: Tensor
    weights_BF: Tensor | None
    first_labels_BF: Tensor | None
    degenerate: Tensor
    scale: Tensor


class Student(nn.Module):
    """uint8 images → logits, through neighbours in the scope.

    Args:
        stem: normalised images [B, 3, S, S] → x_BD.
        dim, graph_dim, hidden, num_classes: D, d, H, C.
        label_dim: E of the neighbours' label embedding, ``dataset`` scope only; 0: none.
        k: neighbours; fewer where there are not k+1 candidates.
        scope: ``none``: the control, an MLP over the stem without any graph parameter;
            ``batch``: the graph of the mini-batch; ``dataset``: candidates from the bank.
        mean, std: of the images' channels, in units of 0..1.

    Raises:
        UserError: unknown scope, k < 1.
    """

    def __init__(
        self,
        stem: nn.Module,
        dim: int,
        graph_dim: int,
        hidden: int,
        num_classes: int,
        label_dim: int,
        k: int,
        scope: Scope,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if scope not in get_args(Scope):
            raise UserError(
                f"There is no scope '{scope}'",
                where="graph.scope",
                remedy=f"one of {', '.join(get_args(Scope))}",
            )
        if k < 1:
            raise UserError(
                f"k = {k} neighbours", where="graph.neighbours", remedy="at least 1, or scope none"
            )
        self.scope = scope
        self.k = k
        self.normalise = Normalise(mean, std)
        self.stem = stem
        # What all scopes have is initialised first, so that the control begins with the same
        # weights: the stem outside, then the self path, then what only the graph has.
        labels = label_dim if scope == "dataset" else 0
        gnn = TwoLayerGNN(dim, hidden, num_classes, labels, graph=scope != "none")
        self.head = GraphHead(dim, graph_dim) if scope != "none" else None
        self.gnn = gnn

    def embed(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """x_BD and z_Bd of images; without a graph head z is x at unit length."""
        x_BD = self.stem(self.normalise(images_BHWC))
        z_Bd = self.head(x_BD) if self.head is not None else F.normalize(x_BD.float(), dim=1)
        return x_BD, z_Bd

    def forward(
        self,
        images_BHWC: Tensor,
        block: CandidateBlock | Callable[[Tensor], CandidateBlock] | None = None,
    ) -> StudentOutput:
        """Classify images.

        Args:
            images_BHWC: uint8, or float in 0..255.
            block: candidates from the bank, in ``dataset`` scope only, or what finds them when
                called with z_Bd. None there (warm-up, before there is a bank): the self path;
                graph parameters get zero gradients.
        """
        x_BD, z_Bd = self.embed(images_BHWC)
        first_labels_BF: Tensor | None = None
        if self.scope == "batch":
            found = self._batch_neighbours(z_Bd)
            logits_BC, self_BC = self.gnn(x_BD, None, found.p_BM)
        elif self.scope == "dataset" and block is not None:
            block = block if isinstance(block, CandidateBlock) else block(z_Bd.detach())
            found, around = self._bank_neighbours(z_Bd, block)
            first_labels_BF = block.first_labels_BF()
            logits_BC, self_BC = self.gnn(x_BD, around)
        else:
            logits_BC, self_BC = self.gnn(x_BD)
            if self.head is not None:
                logits_BC = logits_BC + 0.0 * z_Bd.sum()
            none = torch.zeros((), dtype=z_Bd.dtype, device=z_Bd.device)
            return StudentOutput(logits_BC, self_BC, x_BD, z_Bd, None, None, none.long(), none)
        degenerate, scale = _summary(found)
        return StudentOutput(
            logits_BC, self_BC, x_BD, z_Bd, found.p_BM, first_labels_BF, degenerate, scale
        )

    def graph_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that only the path through the neighbours has, by name."""
        graph_only = ("head.", "gnn.neighbour", "gnn.gate", "gnn.label")
        return {n: p for n, p in self.named_parameters() if n.startswith(graph_only)}

    def _batch_neighbours(self, z_Bd: Tensor) -> Neighbours:
        others_BB = ~torch.eye(len(z_Bd), dtype=torch.bool, device=z_Bd.device)
        k = max(1, min(self.k, len(z_Bd) - 2))
        return adaptive_neighbours(pairwise_squared_distances(z_Bd, z_Bd), k, others_BB)

    def _bank_neighbours(
        self, z_Bd: Tensor, block: CandidateBlock
    ) -> tuple[Neighbours, NeighbourBlock]:
        x_VD, z_Vd = block.x_VD.to(z_Bd.dtype), block.z_Vd.to(z_Bd.dtype)
        if block.second is not None:
            return self._cached_neighbours(z_Bd, x_VD, z_Vd, block, block.second)
        near_BFd = _rows(z_Vd, block.first_BF)
        found = self._nearest(z_Bd, near_BFd, block._present_BF())
        unique_of_BF = block.unique_of_BF.clamp(min=0)
        with torch.no_grad():
            second = self._second_hop(x_VD, z_Vd, block, unique_of_BF)
            around = NeighbourBlock(
                weights_BF=found.p_BM,
                unique_of_BF=unique_of_BF,
                x_UD=_rows(x_VD, block.unique_U),
                mean_UD=second.mean_UD,
                labels_U=block.labels_V[block.unique_U],
                back_BF=second.back_BF,
                seed_x_BD=_rows(x_VD, block.seed_V),
            )
        return found, around

    def _cached_neighbours(
        self, z_Bd: Tensor, x_VD: Tensor, z_Vd: Tensor, block: CandidateBlock, second: SecondHop
    ) -> tuple[Neighbours, NeighbourBlock]:
        """The same where the second hop is known: nothing is gathered twice."""
        slots = block.first_BF.numel()
        near_BFd = z_Vd[:slots].view(*block.first_BF.shape, -1)
        found = self._nearest(z_Bd, near_BFd, block._present_BF())
        around = NeighbourBlock(
            weights_BF=found.p_BM,
            unique_of_BF=None,
            x_UD=x_VD[:slots],
            mean_UD=second.mean_UD.to(z_Bd.dtype),
            labels_U=block.labels_V[:slots],
            back_BF=second.back_BF.to(z_Bd.dtype),
            seed_x_BD=_rows(x_VD, block.seed_V),
        )
        return found, around

    def _second_hop(
        self, x_VD: Tensor, z_Vd: Tensor, block: CandidateBlock, unique_of_BF: Tensor
    ) -> SecondHop:
        apart_UG = block.second_UG != block.unique_U.unsqueeze(1)
        present_UG = (block.second_UG >= 0) & apart_UG
        # In place: fresh memory for U·G·d differences costs more than they do.
        apart_UGd = _rows(z_Vd, block.second_UG).sub_(_rows(z_Vd, block.unique_U).unsqueeze(1))
        p_UG = self._weights(apart_UGd.square_().sum(-1), present_UG).p_BM
        second_UG = block.second_UG.clamp(min=0)
        mean_UD = F.embedding_bag(second_UG, x_VD, per_sample_weights=p_UG, mode="sum")
        # p_ji, wherever the seed i lies among the candidates of its neighbour j. An unseen
        # image (-1) meets empty slots (-1) only: their weight is 0.
        is_seed_BFG = _rows(block.second_UG, unique_of_BF) == block.seed_V.view(-1, 1, 1)
        return SecondHop(mean_UD, (_rows(p_UG, unique_of_BF) * is_seed_BFG).sum(-1))

    def _nearest(self, z_Bd: Tensor, near_BMd: Tensor, present_BM: Tensor) -> Neighbours:
        return self._weights(squared_distances(z_Bd, near_BMd), present_BM)

    def _weights(self, d_BM: Tensor, present_BM: Tensor) -> Neighbours:
        k = max(1, min(self.k, present_BM.shape[1] - 1))
        return adaptive_neighbours(d_BM, k, present_BM)


def _rows(table_VX: Tensor, ids: Tensor) -> Tensor:
    """Rows of constants, [*ids.shape, X]; -1 gives some row. In a tenth of the time of indexing."""
    flat = table_VX.index_select(0, ids.clamp(min=0).reshape(-1))
    return flat.view(*ids.shape, table_VX.shape[-1])


def _summary(found: Neighbours) -> tuple[Tensor, Tensor]:
    spread_B = found.scale_B
    # nanmedian keeps the rows without a closed form out, and needs no synchronisation.
    median = torch.where(spread_B > 0, spread_B, torch.nan).nanmedian()
    return found.degenerate_B.sum(), median.nan_to_num(0.0)
