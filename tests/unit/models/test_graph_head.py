"""Adaptive neighbors compared with two independent references, in value and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnn2gnn_dist.models.graph_head import (
    GraphHead,
    adaptive_neighbours,
    pairwise_squared_distances,
    squared_distances,
)

SHAPES = [(1, 2, 1), (4, 5, 4), (7, 12, 5), (3, 40, 1), (16, 33, 12)]  # B, M, k


def closed_form(d: np.ndarray, k: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Row by row, from the formula; degenerate rows as documented."""
    p = np.zeros_like(d)
    for i, row in enumerate(d):
        valid = np.arange(len(row)) if mask is None else np.flatnonzero(mask[i])
        order = sorted(valid, key=lambda j: (row[j], j))
        if len(order) <= k:
            p[i, order] = 1.0 / max(len(order), 1)
            continue
        border = row[order[k]]
        scale = k * border - sum(row[j] for j in order[:k])
        for j in order[:k]:
            p[i, j] = 1.0 / k if scale <= 1e-12 else max(border - row[j], 0.0) / scale
    return p


def sparsemax(v_BM: torch.Tensor) -> torch.Tensor:
    """Euclidean projection of rows onto the simplex (Martins and Astudillo, 2016)."""
    sorted_BM = v_BM.sort(dim=1, descending=True).values
    rank_M = torch.arange(1, v_BM.shape[1] + 1, dtype=v_BM.dtype)
    support_BM = 1 + rank_M * sorted_BM > sorted_BM.cumsum(1)
    size_B1 = support_BM.sum(1, keepdim=True)
    total_B1 = torch.where(support_BM, sorted_BM, 0.0).sum(1, keepdim=True)
    return (v_BM - (total_B1 - 1) / size_B1).clamp(min=0)


def spread(d_BM: torch.Tensor, k: int) -> torch.Tensor:
    nearest = d_BM.topk(k + 1, dim=1, largest=False).values
    return k * nearest[:, k:].sum(1, keepdim=True) - nearest[:, :k].sum(1, keepdim=True)


def distances(b: int, m: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, m, generator=generator, dtype=torch.float64) * 3 + 0.1


@pytest.mark.parametrize(("b", "m", "k"), SHAPES)
def test_values_equal_both_references(b: int, m: int, k: int) -> None:
    d_BM = distances(b, m)
    found = adaptive_neighbours(d_BM, k)
    np.testing.assert_allclose(found.p_BM, closed_form(d_BM.numpy(), k), atol=1e-12)
    torch.testing.assert_close(found.p_BM, sparsemax(-d_BM / spread(d_BM, k)))
    torch.testing.assert_close(found.scale_B, spread(d_BM, k).squeeze(1))
    assert not found.degenerate_B.any()
    assert ((found.p_BM > 0).sum(1) == k).all()


@pytest.mark.parametrize(("b", "m", "k"), SHAPES)
def test_gradients_equal_sparsemax(b: int, m: int, k: int) -> None:
    upstream_BM = torch.randn(b, m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = distances(b, m).requires_grad_()
    theirs = distances(b, m).requires_grad_()
    (adaptive_neighbours(ours, k).p_BM * upstream_BM).sum().backward()
    (sparsemax(-theirs / spread(theirs, k)) * upstream_BM).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_jacobian_has_the_stated_form() -> None:
    k, d_M = 4, distances(1, 9)[0]
    p_M = adaptive_neighbours(d_M[None], k).p_BM[0]
    scale = spread(d_M[None], k).item()
    jacobian = torch.autograd.functional.jacobian(
        lambda d: adaptive_neighbours(d[None], k).p_BM[0], d_M
    )
    order = d_M.argsort()
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for j in order[:k]:
        for l in order[:k]:  # noqa: E741
            expected[j, l] = (p_M[j] - float(j == l)) / scale
        expected[j, order[k]] = (1 - k * p_M[j]) / scale
    torch.testing.assert_close(jacobian, expected)


def test_gradcheck_with_a_mask() -> None:
    mask_BM = torch.ones(4, 9, dtype=torch.bool)
    mask_BM[0, :3] = False
    mask_BM[1, 2:] = False  # two valid: uniform
    mask_BM[2] = False  # none
    d_BM = distances(4, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: adaptive_neighbours(d, 3, mask_BM).p_BM, d_BM)


def test_mask_equals_leaving_the_columns_out() -> None:
    d_BM = distances(5, 12)
    mask_BM = torch.ones_like(d_BM, dtype=torch.bool)
    mask_BM[:, [0, 7]] = False
    poisoned = d_BM.clone()
    poisoned[:, 0], poisoned[:, 7] = torch.nan, -torch.inf
    poisoned.requires_grad_()
    kept = [j for j in range(12) if j not in (0, 7)]
    p_BM = adaptive_neighbours(poisoned, 4, mask_BM).p_BM
    torch.testing.assert_close(p_BM[:, kept], adaptive_neighbours(d_BM[:, kept], 4).p_BM)
    assert (p_BM[:, [0, 7]] == 0).all()
    p_BM.square().sum().backward()
    assert poisoned.grad is not None
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[:, [0, 7]] == 0).all()


# Rows that break an implementation by thresholds or naive division: (row, k, expected, degenerate).
HARD_ROWS = {
    "all equal": ([1.0] * 6, 3, [1 / 3, 1 / 3, 1 / 3, 0, 0, 0], True),
    "all zero": ([0.0] * 5, 2, [1 / 2, 1 / 2, 0, 0, 0], True),
    "k+1 equal, then far": ([2.0, 9.0, 2.0, 2.0, 9.0], 2, [1 / 2, 0, 1 / 2, 0, 0], True),
    "tie at the border": ([1.0, 2.0, 2.0, 2.0], 2, [1, 0, 0, 0], False),
    "tie inside": ([1.0, 1.0, 3.0, 5.0], 3, [0.4, 0.4, 0.2, 0], False),
    "duplicates of the seed": ([0.0, 0.0, 0.0, 4.0], 2, [1 / 2, 1 / 2, 0, 0], True),
    "as many as k": ([1.0, 2.0, 3.0], 3, [1 / 3, 1 / 3, 1 / 3], False),
    "fewer than k": ([5.0, 1.0], 4, [1 / 2, 1 / 2], False),
    "one candidate": ([7.0], 3, [1.0], False),
    "negative after a shift": ([-3.0, -2.0, -1.0], 2, [2 / 3, 1 / 3, 0], False),
}


@pytest.mark.parametrize("name", HARD_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_rows(name: str, dtype: torch.dtype) -> None:
    row, k, expected, degenerate = HARD_ROWS[name]
    d_BM = torch.tensor([row], dtype=dtype, requires_grad=True)
    found = adaptive_neighbours(d_BM, k)
    torch.testing.assert_close(found.p_BM, torch.tensor([expected], dtype=dtype))
    assert found.p_BM.dtype == dtype
    assert found.degenerate_B.tolist() == [degenerate]
    found.p_BM.square().sum().backward()
    assert d_BM.grad is not None
    assert d_BM.grad.isfinite().all()


def test_masked_hard_rows() -> None:
    d_BM = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3, requires_grad=True)
    mask_BM = torch.tensor([[True, False, True, False], [False] * 4, [True, False, False, False]])
    found = adaptive_neighbours(d_BM, 2, mask_BM)
    assert found.p_BM.tolist() == [[0.5, 0, 0.5, 0], [0] * 4, [1, 0, 0, 0]]
    assert found.scale_B.tolist() == [0, 0, 0]
    found.p_BM.sum().backward()  # has gradients, all zero: ZeRO and DDP need them
    assert d_BM.grad is not None
    assert (d_BM.grad == 0).all()


def test_no_candidates_and_no_rows() -> None:
    for shape in ((3, 0), (0, 4), (0, 0)):
        d_BM = torch.zeros(shape, requires_grad=True)
        found = adaptive_neighbours(d_BM, 2)
        assert found.p_BM.shape == shape
        assert found.scale_B.shape == found.degenerate_B.shape == (shape[0],)
        found.p_BM.sum().backward()
        assert d_BM.grad is not None
    assert not found.scale_B.requires_grad


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("shift", [0.0, 2.0, -5.0])
def test_degenerate_rows_are_constant_among_others(scale: float, shift: float) -> None:
    """Constant rows at any scale and shift give uniform weights, with gradients of exactly 0."""
    torch.manual_seed(0)
    d_BM = torch.rand(6, 9)
    d_BM[2] = 0.3
    d_BM[4, 3:8], d_BM[4, [0, 1, 2, 8]] = 0.1, 0.9
    d_BM = (scale * d_BM + shift).requires_grad_()
    found = adaptive_neighbours(d_BM, 4)
    assert found.degenerate_B.tolist() == [False, False, True, False, True, False]
    assert found.p_BM[2].tolist() == [0.25] * 4 + [0] * 5
    assert found.p_BM[4].tolist() == [0, 0, 0] + [0.25] * 4 + [0, 0]
    assert (found.scale_B[[2, 4]] == 0).all()
    assert (found.scale_B[[0, 1, 3, 5]] > 0).all()
    (found.p_BM * torch.randn(6, 9)).sum().backward()
    assert d_BM.grad is not None
    assert (d_BM.grad[[2, 4]] == 0).all()
    assert (d_BM.grad[[0, 1, 3, 5]].abs().sum(1) > 0).all()


def test_border_neighbour_carries_the_gradient_that_a_nudge_shows() -> None:
    d_BM = torch.tensor([[0.1, 0.4, 0.5, 0.9, 2.0]], dtype=torch.float64, requires_grad=True)
    p_BM = adaptive_neighbours(d_BM, 3).p_BM
    p_BM[0, 0].backward()
    assert d_BM.grad is not None
    nudged = d_BM.detach().clone()
    nudged[0, 3] += 1e-6  # the border: the fourth nearest, of weight 0
    slope = (adaptive_neighbours(nudged, 3).p_BM[0, 0] - p_BM[0, 0]).item() / 1e-6
    assert p_BM[0, 3] == 0
    assert d_BM.grad[0, 3].item() == pytest.approx(slope, rel=1e-4)
    assert d_BM.grad[0, 3].abs() > 0.1
    assert d_BM.grad[0, 4] == 0
    assert d_BM.grad.sum().item() == pytest.approx(0, abs=1e-12)  # a shift changes nothing


def test_gradients_of_scaled_and_shifted_rows() -> None:
    """p(a d + c) = p(d), so the gradient shrinks by a."""
    upstream_BM = torch.randn(
        5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    plain = distances(5, 12).requires_grad_()
    moved = (4.0 * distances(5, 12) - 3.0).requires_grad_()
    (adaptive_neighbours(plain, 4).p_BM * upstream_BM).sum().backward()
    (adaptive_neighbours(moved, 4).p_BM * upstream_BM).sum().backward()
    torch.testing.assert_close(moved.grad, plain.grad / 4)


def test_it_minimises_the_stated_objective() -> None:
    """Σ d p + γ Σ p² on the simplex, with γ = S / 2: no feasible step decreases it."""
    d_BM = distances(1, 10)
    found = adaptive_neighbours(d_BM, 4)
    gradient = (d_BM + found.scale_B[:, None] * found.p_BM)[0]
    support = found.p_BM[0] > 0
    torch.testing.assert_close(gradient[support], gradient[support][:1].expand(4))
    assert (gradient[~support] >= gradient[support][0] - 1e-12).all()


@pytest.mark.parametrize("seed", range(20))
def test_rows_sum_to_one_on_coarse_distances(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = rng.integers(0, 4, (32, 11)).astype(np.float64)  # full of ties
    k = int(rng.integers(1, 13))
    mask = rng.random((32, 11)) < 0.7
    p_BM = adaptive_neighbours(torch.tensor(d), k, torch.tensor(mask)).p_BM
    np.testing.assert_allclose(p_BM, closed_form(d, k, mask), atol=1e-12)
    np.testing.assert_allclose(p_BM.sum(1), mask.any(1).astype(float))
    assert ((p_BM > 0).sum(1) <= max(k, 1)).all()


def test_invariant_to_scale_and_shift() -> None:
    d_BM = distances(6, 15)
    p_BM = adaptive_neighbours(d_BM, 5).p_BM
    shifted_BM = 7.5 * d_BM + torch.linspace(-20, 20, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(adaptive_neighbours(shifted_BM, 5).p_BM, p_BM)


def test_equivariant_to_the_order_of_columns() -> None:
    d_BM, order = distances(6, 15), torch.randperm(15)
    p_BM = adaptive_neighbours(d_BM, 5).p_BM
    torch.testing.assert_close(adaptive_neighbours(d_BM[:, order], 5).p_BM, p_BM[:, order])


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        adaptive_neighbours(torch.ones(2, 3), 0)


def test_distances() -> None:
    z_Bd = torch.randn(5, 8, dtype=torch.float64)
    c_Vd = torch.randn(7, 8, dtype=torch.float64)
    expected = torch.cdist(z_Bd, c_Vd).square()
    torch.testing.assert_close(pairwise_squared_distances(z_Bd, c_Vd), expected)
    torch.testing.assert_close(squared_distances(z_Bd, c_Vd.expand(5, 7, 8)), expected)


def test_head_is_unit_length_and_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head = GraphHead(12, 6)
    x_BD = torch.randn(32, 12)
    expected = head(x_BD)
    head.norm.reset_running_stats()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_Bd = head(x_BD)
        d_BB = pairwise_squared_distances(z_Bd, z_Bd)
    assert z_Bd.dtype == d_BB.dtype == torch.float32
    assert torch.equal(z_Bd, expected)
    torch.testing.assert_close(z_Bd.norm(dim=1), torch.ones(32))
    assert [n for n, _ in head.named_parameters()] == ["project.weight"]
    by_hand = x_BD @ head.project.weight.T
    by_hand = (by_hand - by_hand.mean(0)) / (by_hand.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(z_Bd, by_hand / by_hand.norm(dim=1, keepdim=True))
