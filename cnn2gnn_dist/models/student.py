"""The student: stem, graph head and two-layer GNN, in one of three scopes.

Shapes: B seeds, F first-hop slots of a seed; D features, d projection, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.block import Block, BlockQuery, nearest
from cnn2gnn_dist.models.gnn import TwoLayerGNN
from cnn2gnn_dist.models.graph_head import (
    GraphHead,
    Neighbours,
    adaptive_neighbours,
    pairwise_squared_distances,
    squared_distances,
)
from cnn2gnn_dist.models.normalise import Normalise
from cnn2gnn_dist.models.precision import MixedPrecision

Scope = Literal["none", "batch", "dataset"]


@dataclass
class StudentOutput:
    """The result of a forward pass.

    Attributes:
        logits_BC, self_logits_BC: with the graph, and of the self path alone.
        x_BD, z_Bd: features and projection: the rows of the next bank.
        weights_BF: p_ij over the candidates ([B, B] in ``batch`` scope); None without a graph.
        first_labels_BF: labels of the candidates, -1 = unknown; ``dataset`` scope only.
        degenerate: int tensor [], rows of p whose distances have no spread.
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


class Student(MixedPrecision):
    """uint8 images → logits, through the neighbors in the scope.

    Args:
        stem: normalized images [B, 3, S, S] → x_BD.
        dim, graph_dim, hidden, num_classes: D, d, H, C.
        label_dim: E of the neighbors' label embedding, ``dataset`` scope only; 0: none.
        k: neighbors; fewer where there are fewer than k+1 candidates.
        scope: ``none``: the control, an MLP over the stem without any graph parameter;
            ``batch``: the graph of the mini-batch; ``dataset``: candidates from the bank.
        mean, std: of the image channels, in units of 0..1.

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
                f"unknown scope '{scope}'",
                where="graph.scope",
                remedy=f"use one of {', '.join(get_args(Scope))}",
            )
        if k < 1:
            raise UserError(
                f"k = {k} neighbors",
                where="graph.neighbours",
                remedy="use at least 1, or graph.scope=none",
            )
        self.scope = scope
        self.k = k
        self.normalise = Normalise(mean, std)
        self.stem = stem
        # What all scopes share is initialized first, so that the control starts with the same
        # weights: the stem outside, then the self path, then what only the graph has.
        labels = label_dim if scope == "dataset" else 0
        gnn = TwoLayerGNN(dim, hidden, num_classes, labels, graph=scope != "none")
        self.head = GraphHead(dim, graph_dim) if scope != "none" else None
        self.gnn = gnn

    def embed(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """x_BD and z_Bd of images; without a graph head z is x normalized to unit length."""
        with self.autocast(images_BHWC.device):
            x_BD = self.stem(self.normalise(images_BHWC))
            z_Bd = self.head(x_BD) if self.head is not None else F.normalize(x_BD.float(), dim=1)
        return x_BD, z_Bd

    def forward(
        self,
        images_BHWC: Tensor,
        block: Block | BlockQuery | None = None,
    ) -> StudentOutput:
        """Classify images.

        Args:
            images_BHWC: uint8, or float in 0..255.
            block: candidates from the bank, in ``dataset`` scope only, or a query that finds them
                by z_Bd. None there (warm-up, before there is a bank): the self path; graph
                parameters get zero gradients.
        """
        with self.autocast(images_BHWC.device):
            return self._forward(images_BHWC, block)

    def _forward(self, images_BHWC: Tensor, block: Block | BlockQuery | None) -> StudentOutput:
        x_BD, z_Bd = self.embed(images_BHWC)
        first_labels_BF: Tensor | None = None
        if self.scope == "batch":
            found = self._batch_neighbours(z_Bd)
            logits_BC, self_BC = self.gnn(x_BD, found.p_BM)
        elif self.scope == "dataset" and block is not None:
            block = block if isinstance(block, Block) else block.block(z_Bd.detach())
            block = block.to(z_Bd.device, z_Bd.dtype)
            near_BFd = block.in_slots(block.z_Ud)
            found = nearest(squared_distances(z_Bd, near_BFd), self.k, block.present_BF)
            first_labels_BF = block.first_labels_BF()
            logits_BC, self_BC = self.gnn(x_BD, found.p_BM, block)
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
        """Parameters used only by the path through the neighbors, by name."""
        graph_only = ("head.", "gnn.neighbour", "gnn.gate", "gnn.label")
        return {n: p for n, p in self.named_parameters() if n.startswith(graph_only)}

    def _batch_neighbours(self, z_Bd: Tensor) -> Neighbours:
        others_BB = ~torch.eye(len(z_Bd), dtype=torch.bool, device=z_Bd.device)
        k = max(1, min(self.k, len(z_Bd) - 2))
        return adaptive_neighbours(pairwise_squared_distances(z_Bd, z_Bd), k, others_BB)


def _summary(found: Neighbours) -> tuple[Tensor, Tensor]:
    spread_B = found.scale_B
    # nanmedian excludes the rows without a closed form, and needs no synchronization.
    median = torch.where(spread_B > 0, spread_B, torch.nan).nanmedian()
    return found.degenerate_B.sum(), median.nan_to_num(0.0)
