"""The student in half precision: what is rounded, and what is not."""

from __future__ import annotations

import pytest
import torch

from cnn2gnn_dist.models.block import Block
from tests.unit.models.test_student import SEEDS, Bank, D, block_of, make_images, student


def test_half_precision_bank_and_autocast() -> None:
    bank, made = Bank(), student("dataset").float()
    images = make_images(len(SEEDS))
    nodes = bank.nodes(SEEDS)
    exact = made(images, block_of(nodes))
    stored = block_of(nodes, x_VD=nodes["x_VD"].half(), z_Vd=nodes["z_Vd"].float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(images, stored)
    assert out.z_Bd.dtype == out.weights_BF.dtype == torch.float32
    torch.testing.assert_close(out.logits_BC.float(), exact.logits_BC, atol=0.1, rtol=0.05)
    out.logits_BC.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("back", [0.5, 0.99, 0.9999])
@pytest.mark.parametrize("shared", [True, False])
def test_a_heavy_seed_is_taken_out_of_the_second_hop_under_autocast(
    back: float, shared: bool
) -> None:
    """What is left of a second hop after its seed is exact, however little it weighed."""
    gen = torch.Generator().manual_seed(0)
    x_D, rest_D = torch.randn(2, D, generator=gen)
    gnn = student("dataset").float().gnn
    block = Block(
        present_BF=torch.ones(1, 1, dtype=torch.bool),
        row_of_BF=torch.zeros(1, 1, dtype=torch.int64) if shared else None,
        x_UD=torch.zeros(1, D),
        z_Ud=torch.zeros(1, 2),
        labels_U=torch.zeros(1, dtype=torch.int64),
        mean_UD=(back * x_D + (1 - back) * rest_D)[None],
        back_BF=torch.tensor([[back]]),
        seed_x_BD=x_D[None],
    )
    with torch.autocast("cpu", torch.bfloat16):
        around_H = gnn._around(block)[0, 0]
    expected_H = gnn.neighbour1(rest_D)
    assert (around_H - expected_H).norm() < 0.02 * expected_H.norm()


def test_weights_of_the_batch_keep_their_precision_under_autocast() -> None:
    """The weights of a row sum to 1, and their gradients differ by less than 8 bits would let them."""
    made, seen = student("batch").float(), []
    made.gnn.neighbour1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    p_BB = torch.full((12, 12), 1 / 11).fill_diagonal_(0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits_BC, _ = made.gnn(torch.ones(12, D), p_BB)
    torch.testing.assert_close(seen[0].float(), torch.ones(12, D), atol=1e-6, rtol=0)
    logits_BC.float().sum().backward()
    assert p_BB.grad is not None
    assert p_BB.grad.dtype == torch.float32
