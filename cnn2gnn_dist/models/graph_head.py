"""The graph learned from the images: a projection and its adaptive neighbors.

Shapes: B rows (seeds), M candidates per row, d dimensions of the projection, k neighbors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS_UNITS = 8  # a row is degenerate if its spread is below this many units of rounding error


class Neighbours(NamedTuple):
    """Weights of each row over its candidates, with statistics for logging.

    Attributes:
        p_BM: the weights; rows sum to 1, or to 0 where a row has no valid candidate.
        scale_B: S, detached: the gradient of p grows with 1/S. 0 on rows without a closed form.
        degenerate_B: rows whose k+1 nearest are equidistant (uniform weights were used).
    """

    p_BM: Tensor
    scale_B: Tensor
    degenerate_B: Tensor


def adaptive_neighbours(d_BM: Tensor, k: int, mask_BM: Tensor | None = None) -> Neighbours:
    """Closed-form neighbor weights over distances, after CAN (Nie et al., KDD 2014).

    With the distances of a row sorted, ``p_j = max(d_(k+1) − d_j, 0) / S`` and
    ``S = Σ_{m≤k} (d_(k+1) − d_(m))``: the minimizer of ``Σ_j d_j p_j + γ Σ_j p_j²`` on the simplex
    whose support is the k nearest, equal to ``sparsemax(−d / S)``. Invariant to scaling and
    shifting a row. The border neighbor k+1 carries gradient: ``∂p_j/∂d_l = (p_j − [j=l]) / S``
    for l among the k nearest, ``∂p_j/∂d_(k+1) = (1 − k p_j) / S``.

    The k nearest are chosen by index, with ties to the smaller column, so duplicates can't make a row
    sum to more than 1. Rows without a closed form get constant weights (and zero gradients):
    k+1 equal distances: 1/k on the chosen k; at most k valid candidates: uniform over those;
    none: all zero.

    Args:
        d_BM: distances, float32 or float64; may be shifted or negative; finite where valid.
        k: number of neighbors, at least 1.
        mask_BM: True where a candidate is valid; None: all are.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k = {k}: at least one neighbor is needed")
    if mask_BM is None:
        mask_BM = torch.ones_like(d_BM, dtype=torch.bool)
    d_BM = torch.where(mask_BM, d_BM, 0.0)  # keep masked values, even NaN, out of the computation
    valid_B = mask_BM.sum(1, keepdim=True)
    uniform_BM = mask_BM.to(d_BM.dtype) / valid_B.clamp(min=1)
    if d_BM.shape[1] <= k:
        # Kept in the autograd graph: ZeRO and DDP need a gradient, even if 0, for every parameter.
        flags_B = torch.zeros(d_BM.shape[0], dtype=torch.bool, device=d_BM.device)
        return Neighbours(uniform_BM + 0.0 * d_BM, d_BM.new_zeros(d_BM.shape[0]), flags_B)

    with torch.no_grad():
        order_BM = torch.where(mask_BM, d_BM, torch.inf).sort(dim=1, stable=True).indices
    nearest_BM = order_BM[:, : k + 1]  # the k nearest and the border
    sorted_BM = d_BM.gather(1, nearest_BM)
    border_B1 = sorted_BM[:, k:]
    gaps_Bk = border_B1 - sorted_BM[:, :k]
    scale_B1 = gaps_Bk.sum(1, keepdim=True)

    short_B1 = valid_B <= k
    rounding = _EPS_UNITS * torch.finfo(d_BM.dtype).eps
    degenerate_B1 = ~short_B1 & (scale_B1 <= rounding * k * border_B1.abs())
    # The inner where keeps 0/0 out of the backward pass, the outer one out of the forward pass.
    safe_B1 = torch.where(degenerate_B1 | short_B1, 1.0, scale_B1)
    p_Bk = torch.where(degenerate_B1, 1.0 / k, gaps_Bk / safe_B1)
    p_BM = torch.zeros_like(d_BM).scatter(1, nearest_BM[:, :k], p_Bk)
    p_BM = torch.where(short_B1, uniform_BM, p_BM)
    scale_B = torch.where(degenerate_B1 | short_B1, 0.0, scale_B1).squeeze(1).detach()
    return Neighbours(p_BM, scale_B, degenerate_B1.squeeze(1))


def squared_distances(z_Bd: Tensor, c_BMd: Tensor) -> Tensor:
    """‖z_i − c_ij‖² of every row to its own candidates, [B, M]; from differences, hence exact."""
    return (z_Bd.unsqueeze(1) - c_BMd).square().sum(-1)


def pairwise_squared_distances(z_Bd: Tensor, c_Md: Tensor) -> Tensor:
    """‖z_i − c_j‖² of all pairs, [B, M], by one matmul, in at least float32.

    Equal vectors may give slightly negative values (rounding); no clamp, which would cut gradients.
    """
    with torch.autocast(z_Bd.device.type, enabled=False):
        norms_BM = z_Bd.square().sum(1, keepdim=True) + c_Md.square().sum(1)
        return norms_BM - 2.0 * z_Bd @ c_Md.T


class Float32Linear(nn.Linear):
    """A linear layer that stays in float32.

    DeepSpeed's autocast gathers and reduces the weights of ``nn.Linear`` itself in the lower
    precision, but not those of this subclass (ZeRO-3 would round them).
    """


class GraphHead(nn.Module):
    """z = normalize(BatchNorm(W x)): the projection whose distances define the graph.

    BatchNorm has no affine part: with one, a bank of an earlier epoch collapses. Everything is in
    float32 under any autocast: bf16 distances change a row of weights by 0.05 in L1.

    Shapes: x_BD → z_Bd of unit length.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.project = Float32Linear(dim_in, dim_out, bias=False)
        self.norm = nn.BatchNorm1d(dim_out, affine=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Project, standardize and normalize to unit length."""
        with torch.autocast(x_BD.device.type, enabled=False):
            z_Bd = self.project(x_BD.to(self.project.weight.dtype))
            return F.normalize(self.norm(z_Bd), dim=1)
