"""The GNN over blocks compared with a dense N×N graph from which each seed is explicitly removed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cnn2gnn_dist.models.block import Block
from cnn2gnn_dist.models.gnn import TwoLayerGNN

D, H, C, E = 6, 9, 4, 3


def model(label_dim: int = E, gates: bool = True, seed: int = 0) -> TwoLayerGNN:
    torch.manual_seed(seed)
    gnn = TwoLayerGNN(D, H, C, label_dim).double()
    if gates:
        for gate in (gnn.gate1, gnn.gate2):
            torch.nn.init.normal_(gate)
    return gnn


def random_graph(n: int, k: int) -> Tensor:
    """Row-stochastic, k neighbors per row, no self-loops; node 1 has node 0 as its only neighbor."""
    p_NN = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        others = torch.tensor([j for j in range(n) if j != i])
        chosen = others[torch.randperm(n - 1)[:k]]
        p_NN[i, chosen] = torch.rand(k, dtype=torch.float64) + 0.05
    p_NN[0, 1] = 0.7  # so that seed 0 uses node 1
    p_NN[1] = 0.0
    p_NN[1, 0] = 1.0
    return p_NN / p_NN.sum(1, keepdim=True)


def dense_logits(
    gnn: TwoLayerGNN,
    i: int,
    live_D: Tensor,
    p_F: Tensor,
    p_NN: Tensor,
    x_ND: Tensor,
    labels: Tensor,
) -> Tensor:
    """Logits of seed i on the full graph without node i, straight from the definition."""
    a1, a2 = gnn.self1, gnn.self2
    b1, b2 = gnn.neighbour1.weight, gnn.neighbour2.weight
    rest_NN = p_NN.clone()
    rest_NN[:, i] = 0.0
    total_N1 = rest_NN.sum(1, keepdim=True)
    rest_NN = torch.where(total_N1 > 0, rest_NN / total_N1.clamp(min=1e-300), 0.0)
    h_NH = torch.relu(a1(x_ND) + gnn.gate1 * (rest_NN @ x_ND @ b1.T))
    h_H = torch.relu(a1(live_D) + gnn.gate1 * (p_F @ x_ND @ b1.T))
    message = p_F @ h_NH
    if gnn.label_dim:
        label_NE = torch.stack(
            [gnn.label.weight[c] if c >= 0 else torch.zeros(E).double() for c in labels.tolist()]
        )
        message = torch.cat([message, p_F @ label_NE])
    return a2(h_H) + gnn.gate2 * (message @ b2.T)


def make_case(n: int = 14, k: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    seeds_B = torch.tensor([0, 5, 9, 2])
    live_BD = torch.randn(len(seeds_B), D, dtype=torch.float64)
    return (
        seeds_B,
        live_BD,
        random_graph(n, k),
        torch.randn(n, D, dtype=torch.float64),
        torch.randint(-1, C, (n,)),
    )


def make_block(seeds_B: Tensor, p_NN: Tensor, x_ND: Tensor, labels: Tensor) -> tuple[Tensor, Block]:
    """All first-hop neighbors as padded slots over unique nodes (padding: weight 0, index 0)."""
    rows = [p_NN[i].nonzero().squeeze(1) for i in seeds_B]
    unique_U = torch.cat(rows).unique()
    slots = max(len(r) for r in rows) + 2
    weights_BF = torch.zeros(len(rows), slots, dtype=torch.float64)
    row_of_BF = torch.zeros(len(rows), slots, dtype=torch.int64)
    back_BF = torch.zeros(len(rows), slots, dtype=torch.float64)
    for b, (i, row) in enumerate(zip(seeds_B, rows, strict=True)):
        weights_BF[b, : len(row)] = p_NN[i, row]
        row_of_BF[b, : len(row)] = torch.searchsorted(unique_U, row)
        back_BF[b, : len(row)] = p_NN[row, i]
    return weights_BF, Block(
        present_BF=weights_BF > 0,
        row_of_BF=row_of_BF,
        x_UD=x_ND[unique_U],
        z_Ud=x_ND[unique_U],  # unused here
        mean_UD=(p_NN @ x_ND)[unique_U],
        labels_U=labels[unique_U],
        back_BF=back_BF,
        seed_x_BD=x_ND[seeds_B],
    )


@pytest.mark.parametrize("label_dim", [0, E])
def test_block_equals_dense_graph_without_the_seed(label_dim: int) -> None:
    seeds_B, live_BD, p_NN, x_ND, labels = make_case()
    upstream_BC = torch.randn(len(seeds_B), C, dtype=torch.float64)
    ours, theirs = model(label_dim), model(label_dim)
    weights_BF, block = make_block(seeds_B, p_NN, x_ND, labels)
    weights_BF.requires_grad_()
    ours_live = live_BD.clone().requires_grad_()
    logits_BC, self_BC = ours(ours_live, weights_BF, block)

    theirs_live = live_BD.clone().requires_grad_()
    rows_BN = p_NN[seeds_B].clone().requires_grad_()
    expected_BC = torch.stack(
        [
            dense_logits(theirs, int(i), theirs_live[b], rows_BN[b], p_NN, x_ND, labels)
            for b, i in enumerate(seeds_B)
        ]
    )
    torch.testing.assert_close(logits_BC, expected_BC)
    torch.testing.assert_close(self_BC, theirs.self2(torch.relu(theirs.self1(live_BD))))

    (logits_BC * upstream_BC).sum().backward()
    (expected_BC * upstream_BC).sum().backward()
    torch.testing.assert_close(ours_live.grad, theirs_live.grad)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    assert weights_BF.grad is not None
    assert rows_BN.grad is not None
    for b, i in enumerate(seeds_B):
        row = p_NN[i].nonzero().squeeze(1)
        torch.testing.assert_close(weights_BF.grad[b, : len(row)], rows_BN.grad[b, row])


def test_the_correction_matters_and_a_lonely_neighbour_is_finite() -> None:
    seeds_B, live_BD, p_NN, x_ND, labels = make_case()
    weights_BF, block = make_block(seeds_B, p_NN, x_ND, labels)
    assert block.back_BF.max() == 1.0  # node 1 has no neighbor except seed 0
    gnn = model()
    with_seed, _ = gnn(live_BD, weights_BF, replace(block, back_BF=torch.zeros(weights_BF.shape)))
    without_seed, _ = gnn(live_BD, weights_BF, block)
    assert without_seed.isfinite().all()
    assert (with_seed - without_seed).abs().max() > 1e-3


def test_seeds_bank_row_does_not_reach_its_logits() -> None:
    seeds_B, live_BD, p_NN, x_ND, labels = make_case()
    gnn = model()
    before, _ = gnn(live_BD, *make_block(seeds_B, p_NN, x_ND, labels))
    for b, i in enumerate(seeds_B):
        other_x, other_labels = x_ND.clone(), labels.clone()
        other_x[i] += 3.0
        other_labels[i] = (other_labels[i] + 2) % C
        after, _ = gnn(live_BD, *make_block(seeds_B, p_NN, other_x, other_labels))
        torch.testing.assert_close(after[b], before[b])


def test_an_unseen_image_may_have_any_row() -> None:
    """No node gives it weight, so the contents of its bank row do not matter."""
    seeds_B, live_BD, p_NN, x_ND, labels = make_case()
    weights_BF, block = make_block(seeds_B, p_NN, x_ND, labels)
    unseen = replace(block, back_BF=torch.zeros_like(block.back_BF))
    gnn = model()
    before, _ = gnn(live_BD, weights_BF, unseen)
    after, _ = gnn(live_BD, weights_BF, replace(unseen, seed_x_BD=unseen.seed_x_BD + 3.0))
    assert torch.equal(after, before)


def test_padding_has_no_influence() -> None:
    seeds_B, live_BD, p_NN, x_ND, labels = make_case()
    weights_BF, block = make_block(seeds_B, p_NN, x_ND, labels)
    padding = weights_BF == 0
    moved = replace(block, row_of_BF=torch.where(padding, 3, block.row_of_BF))
    gnn = model()
    torch.testing.assert_close(
        gnn(live_BD, weights_BF, moved)[0], gnn(live_BD, weights_BF, block)[0]
    )


def test_gates_at_zero_are_the_self_path_and_learn() -> None:
    seeds_B, live_BD, p_NN, x_ND, labels = make_case()
    gnn = model(gates=False)
    logits_BC, self_BC = gnn(live_BD, *make_block(seeds_B, p_NN, x_ND, labels))
    assert torch.equal(logits_BC, self_BC)
    logits_BC.square().sum().backward()
    for gate in (gnn.gate1, gnn.gate2):
        assert gate.grad is not None
        assert gate.grad.abs().sum() > 0


def test_batch_scope_equals_the_formula() -> None:
    torch.manual_seed(4)
    gnn = model(label_dim=0)
    x_BD = torch.randn(8, D, dtype=torch.float64)
    p_BB = random_graph(8, 3)
    logits_BC, self_BC = gnn(x_BD, p_BB)
    h_BH = torch.relu(gnn.self1(x_BD) + gnn.gate1 * (p_BB @ (x_BD @ gnn.neighbour1.weight.T)))
    message_BC = p_BB @ (h_BH @ gnn.neighbour2.weight.T)
    torch.testing.assert_close(logits_BC, gnn.self2(h_BH) + gnn.gate2 * message_BC)
    torch.testing.assert_close(self_BC, gnn.self2(torch.relu(gnn.self1(x_BD))))
    with_labels = model()
    assert with_labels(x_BD, p_BB)[0].shape == (8, C)


def test_gradients_in_batch_scope_equal_the_formula() -> None:
    torch.manual_seed(4)
    ours, theirs = model(label_dim=0), model(label_dim=0)
    x, p = torch.randn(8, D, dtype=torch.float64), random_graph(8, 3)
    upstream_BC = torch.randn(8, C, dtype=torch.float64)
    leaves = [(x.clone().requires_grad_(), p.clone().requires_grad_()) for _ in range(2)]
    (x_BD, p_BB), (y_BD, q_BB) = leaves
    (ours(x_BD, p_BB)[0] * upstream_BC).sum().backward()
    b1, b2 = theirs.neighbour1.weight, theirs.neighbour2.weight
    rows = []
    for i in range(8):  # one node at a time, with sums instead of matrix products
        h = [
            torch.relu(
                theirs.self1(y_BD[j])
                + theirs.gate1 * sum(q_BB[j, l] * (b1 @ y_BD[l]) for l in range(8))  # noqa: E741
            )
            for j in range(8)
        ]
        message = sum(q_BB[i, j] * (b2 @ h[j]) for j in range(8))
        rows.append(theirs.self2(h[i]) + theirs.gate2 * message)
    (torch.stack(rows) * upstream_BC).sum().backward()
    torch.testing.assert_close(x_BD.grad, y_BD.grad)
    torch.testing.assert_close(p_BB.grad, q_BB.grad)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_a_neighbour_that_almost_only_has_the_seed_is_finite_in_float32() -> None:
    """Near 1 the renormalization divides one rounding error by another: it must stay bounded."""
    seeds_B, live_BD, p_NN, x_ND, labels = make_case()
    weights_BF, block = make_block(seeds_B, p_NN, x_ND, labels)
    gnn = model().float()
    for back in (1.0, 1.0 - 1e-7, 1.0 - 9e-6, 1.0 - 1e-4):
        single = block.to("cpu", torch.float32)
        single.back_BF = torch.full_like(single.back_BF, back)
        single.mean_UD = single.seed_x_BD[:1].expand_as(single.mean_UD).clone()
        gnn.zero_grad()
        logits_BC, _ = gnn(live_BD.float(), weights_BF.float(), single)
        logits_BC.square().sum().backward()
        assert logits_BC.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in gnn.parameters())


def test_control_has_the_self_path_only() -> None:
    gnn = TwoLayerGNN(D, H, C, E, graph=False)
    names = {n for n, _ in gnn.named_parameters()}
    assert names == {"self1.weight", "self1.bias", "self2.weight", "self2.bias"}
    logits_BC, self_BC = gnn(torch.randn(3, D))
    assert torch.equal(logits_BC, self_BC)


def test_without_neighbours_every_parameter_gets_a_gradient() -> None:
    gnn = model()
    logits_BC, self_BC = gnn(torch.randn(5, D, dtype=torch.float64))
    assert torch.equal(logits_BC, self_BC)
    logits_BC.sum().backward()
    for name, parameter in gnn.named_parameters():
        assert parameter.grad is not None, name
        if not name.startswith("self"):
            assert (parameter.grad == 0).all(), name
