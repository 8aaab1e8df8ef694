"""The student on blocks that the graph package builds: bank, sampler and block combined as in a stage.

The dense references are those of ``test_student``, which builds its blocks by hand.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cnn2gnn_dist.graph.block import BlockIds, block_ids
from cnn2gnn_dist.graph.partition.parts import PartGraph, build_union
from cnn2gnn_dist.graph.sampler import make_sampler
from cnn2gnn_dist.models.block import Block
from tests.support.blocks import sampled_block
from tests.unit.models.test_student import (
    SEEDS,
    Bank,
    K,
    M,
    N,
    block_of,
    make_images,
    reference_logits,
    reference_row,
    student,
)

KEY = {"epoch": 0, "step": 0, "rank": 0}


def node_rows(bank: Bank, ids: BlockIds, nodes: np.ndarray) -> dict[str, Tensor]:
    """Bank rows of a block whose ids are local to ``nodes``."""
    rows = torch.from_numpy(nodes[ids.nodes_V])
    found = {"x_VD": bank.x_ND[rows], "z_Vd": bank.z_Nd[rows], "labels_V": bank.labels_N[rows]}
    for name in ("first_U", "row_of_BF", "second_UG", "seed_B"):
        found[name] = torch.from_numpy(getattr(ids, name))
    return found


def with_features(bank: Bank, ids: BlockIds, nodes: np.ndarray) -> Block:
    return block_of(node_rows(bank, ids, nodes))


def whole(bank: Bank) -> PartGraph:
    return PartGraph(-1, np.arange(N), N, 0, bank.table_NM.numpy().astype(np.int32))


def half(bank: Bank) -> PartGraph:
    """The seeds and a few more as inner nodes; the others are halo nodes or absent."""
    inner = np.unique(np.append(SEEDS.numpy(), [1, 2, 3]))
    return build_union(bank.table_NM.numpy().astype(np.int32), inner)


@pytest.mark.parametrize("kind", ["table", "dgl"])
@pytest.mark.parametrize("graph_of", [whole, half])
def test_sampled_block_at_full_fanout_equals_the_dense_reference(kind, graph_of) -> None:
    bank = Bank()
    graph = graph_of(bank)
    local = np.array([int(np.flatnonzero(graph.nodes_L == i)[0]) for i in SEEDS.tolist()])
    sampler = make_sampler(kind, graph.table_KM, 0)
    ids = sampled_block(sampler, local, (M, M), **KEY)
    ours, theirs = student("dataset"), student("dataset")
    images = make_images(len(SEEDS))
    out = ours(images, with_features(bank, ids, graph.nodes_L))
    x_BD, z_Bd = theirs.embed(images)
    expected_BC = torch.stack(
        [reference_logits(theirs, bank, x_BD[b], z_Bd[b], int(i)) for b, i in enumerate(SEEDS)]
    )
    torch.testing.assert_close(out.logits_BC, expected_BC)
    upstream_BC = torch.randn(expected_BC.shape, dtype=torch.float64)
    (out.logits_BC * upstream_BC).sum().backward()
    (expected_BC * upstream_BC).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_seen_and_unseen_images_in_one_block_and_a_query() -> None:
    bank, made = Bank(), student("dataset").eval()
    images = make_images(4)
    seeds = np.array([4, -1, 17, -1])
    sampler = make_sampler("table", whole(bank).table_KM, 0)
    first = bank.table_NM[torch.from_numpy(seeds).clamp(min=0)].numpy()
    first[seeds < 0] = np.arange(M)
    asked: list[Tensor] = []

    class Query:
        def block(self, z_Bd: Tensor) -> Block:
            asked.append(z_Bd)
            return with_features(bank, block_ids(sampler, first, seeds, M, **KEY), np.arange(N))

    out = made(images, Query())
    expected_BC = torch.stack(
        [
            reference_logits(made, bank, out.x_BD[b], out.z_Bd[b], int(i))
            for b, i in enumerate(seeds)
        ]
    )
    torch.testing.assert_close(out.logits_BC, expected_BC)
    assert len(asked) == 1
    assert not asked[0].requires_grad


def test_a_batch_in_which_nobody_has_a_candidate() -> None:
    """All images are copies of each other: each seed gives the same result as next to one that has neighbors."""
    bank, made = Bank(), student("dataset")
    images, seeds = make_images(3), SEEDS[:3].numpy()
    sampler = make_sampler("table", whole(bank).table_KM, 0)
    first = bank.table_NM[SEEDS[:3]].numpy()
    first[:2] = -1
    mixed = block_ids(sampler, first, seeds, M, **KEY)
    alone = block_ids(sampler, first[:2], seeds[:2], M, **KEY)
    expected = made(images, with_features(bank, mixed, np.arange(N))).logits_BC[:2]
    found = made(images[:2], with_features(bank, alone, np.arange(N)))
    torch.testing.assert_close(found.logits_BC, expected)
    assert (found.weights_BF == 0).all()
    found.logits_BC.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_own_label_and_row_do_not_reach_a_seed_through_a_searched_block() -> None:
    """The search may return the seed itself, which must leave no trace."""
    bank, made = Bank(), student("dataset").eval()
    images = make_images(len(SEEDS))
    sampler = make_sampler("table", whole(bank).table_KM, 0)
    first = torch.cat([SEEDS[:, None], bank.table_NM[SEEDS]], 1).numpy()
    ids = block_ids(sampler, first, SEEDS.numpy(), M, **KEY)
    nodes = node_rows(bank, ids, np.arange(N))
    before = made(images, block_of(nodes))
    before_BC = before.logits_BC
    for b in range(len(SEEDS)):
        own = nodes["seed_B"][b]
        x_VD, labels_V = nodes["x_VD"].clone(), nodes["labels_V"].clone()
        x_VD[own] += 2.0
        labels_V[own] = (labels_V[own] + 2) % 4
        after_BC = made(images, block_of(nodes, x_VD=x_VD, labels_V=labels_V)).logits_BC
        torch.testing.assert_close(after_BC[b], before_BC[b])
    neighbour = nodes["first_U"][nodes["row_of_BF"][0, before.weights_BF[0].argmax()]]
    x_VD = nodes["x_VD"].clone()
    x_VD[neighbour] += 2.0
    assert (made(images, block_of(nodes, x_VD=x_VD)).logits_BC[0] - before_BC[0]).abs().max() > 1e-6


def test_gradients_in_batch_scope_equal_dense() -> None:
    ours, theirs = student("batch"), student("batch")
    images, count = make_images(10), 10
    out = ours(images)
    gnn = theirs.gnn
    x_BD, z_Bd = theirs.embed(images)
    rows = []
    for i in range(count):
        others = torch.tensor([j for j in range(count) if j != i])
        d_M = (z_Bd[i] - z_Bd[others]).square().sum(1)
        rows.append(torch.zeros(count).double().scatter(0, others, reference_row(d_M, K)))
    p_BB = torch.stack(rows)
    h_BH = torch.relu(gnn.self1(x_BD) + gnn.gate1 * gnn.neighbour1(p_BB @ x_BD))
    expected_BC = gnn.self2(h_BH) + gnn.gate2 * gnn.neighbour2(p_BB @ h_BH)
    torch.testing.assert_close(out.logits_BC, expected_BC)
    upstream_BC = torch.randn(expected_BC.shape, dtype=torch.float64)
    (out.logits_BC * upstream_BC).sum().backward()
    (expected_BC * upstream_BC).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    assert ours.head is not None
    assert ours.head.project.weight.grad.abs().sum() > 0


def test_copies_of_one_image_in_a_float32_batch_are_finite() -> None:
    """A matmul's rounding errors must not be taken for distances, nor their inverses for gradients."""
    made = student("batch", k=3).float()
    images = make_images(17)
    images[[0, 3, 5, 8, 11, 16]] = images[0].clone()
    out = made(images)
    torch.testing.assert_close(out.weights_BF.sum(1), torch.ones(17))
    out.logits_BC.square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() < 1e4, name
