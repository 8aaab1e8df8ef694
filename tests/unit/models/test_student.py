"""The student end to end, compared with dense references on a small bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnn2gnn_dist.config import Config, StudentConfig
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.block import Block, averaged_block
from cnn2gnn_dist.models.losses import neighbour_loss
from cnn2gnn_dist.models.student import Scope, Student, StudentOutput
from cnn2gnn_dist.stages.shared.networks import build_student
from cnn2gnn_dist.stages.student import loss_of

N, M, K, D, DZ, H, C, E = 24, 9, 3, 7, 5, 8, 4, 3


def student(scope: Scope, *, gates: bool = True, label_dim: int = E, k: int = K) -> Student:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, D), nn.ReLU())
    made = Student(stem, D, DZ, H, C, label_dim, k, scope, (0.5,) * 3, (0.25,) * 3).double()
    if gates and scope != "none":
        nn.init.normal_(made.gnn.gate1)
        nn.init.normal_(made.gnn.gate2)
    return made


def make_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator)


class Bank:
    """A bank of N rows whose candidate table is random, and blocks over all of it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        self.x_ND = torch.rand(N, D, **options)
        self.z_Nd = nn.functional.normalize(torch.randn(N, DZ, **options), dim=1)
        self.labels_N = torch.randint(-1, C, (N,), generator=generator)
        # Shifted ids: all different, and never the node itself.
        shifts = torch.stack([torch.randperm(N - 1, generator=generator)[:M] + 1 for _ in range(N)])
        self.table_NM = (torch.arange(N)[:, None] + shifts) % N

    def nodes(self, seeds_B: Tensor, first_BF: Tensor | None = None) -> dict[str, Tensor]:
        """The seeds' candidates and the candidates of those; block rows are bank rows in another order."""
        first_BF = self.table_NM[seeds_B] if first_BF is None else first_BF
        order_V = torch.randperm(N, generator=torch.Generator().manual_seed(11))
        place_N = torch.empty_like(order_V)
        place_N[order_V] = torch.arange(N)
        unique, inverse = first_BF.unique(return_inverse=True)
        return {
            "x_VD": self.x_ND[order_V],
            "z_Vd": self.z_Nd[order_V],
            "labels_V": self.labels_N[order_V],
            "first_U": place_N[unique],
            "row_of_BF": inverse,
            "second_UG": place_N[self.table_NM[unique]],
            "seed_B": torch.where(seeds_B >= 0, place_N[seeds_B], -1),
        }

    def block(self, seeds_B: Tensor, first_BF: Tensor | None = None) -> Block:
        return block_of(self.nodes(seeds_B, first_BF))


def block_of(nodes: dict[str, Tensor], **changes: Tensor) -> Block:
    return averaged_block(**{**nodes, **changes}, k=K)


def reference_row(d_M: Tensor, k: int) -> Tensor:
    """sparsemax(−d/S) over one row in sorted order: another route to the closed form."""
    near = d_M.argsort(stable=True)[: k + 1]
    scale = k * d_M[near[k]] - d_M[near[:k]].sum()
    v_M = -d_M / scale
    threshold = (v_M[near[:k]].sum() - 1) / k
    return torch.where(v_M > threshold, v_M - threshold, 0.0)


def reference_logits(made: Student, bank: Bank, x_D: Tensor, z_d: Tensor, seed: int) -> Tensor:
    """One seed's logits on the dense graph without the seed; seed -1: an unseen image."""
    gnn = made.gnn
    table = bank.table_NM
    with torch.no_grad():
        p_NN = torch.zeros(N, N, dtype=torch.float64)
        for j in range(N):
            d_M = (bank.z_Nd[j] - bank.z_Nd[table[j]]).square().sum(1)
            p_NN[j, table[j]] = reference_row(d_M, K)
        if seed >= 0:
            p_NN[:, seed] = 0.0
            p_NN = p_NN / p_NN.sum(1, keepdim=True)
        mean_ND = p_NN @ bank.x_ND
    first = table[seed] if seed >= 0 else torch.arange(M)
    p_F = reference_row((z_d - bank.z_Nd[first]).square().sum(1), K)
    h_NH = torch.relu(gnn.self1(bank.x_ND) + gnn.gate1 * gnn.neighbour1(mean_ND))
    near_D = p_F @ bank.x_ND[first]
    h_H = torch.relu(gnn.self1(x_D) + gnn.gate1 * gnn.neighbour1(near_D))
    known = (bank.labels_N[first] >= 0).double()[:, None]
    label_FE = gnn.label(bank.labels_N[first].clamp(min=0)) * known
    message = torch.cat([p_F @ h_NH[first], p_F @ label_FE])
    return gnn.self2(h_H) + gnn.gate2 * gnn.neighbour2(message)


SEEDS = torch.tensor([4, 17, 0, 9, 22])


def test_dataset_scope_equals_the_dense_reference() -> None:
    bank = Bank()
    ours, theirs = student("dataset"), student("dataset")
    images = make_images(len(SEEDS))
    out = ours(images, bank.block(SEEDS))
    x_BD, z_Bd = theirs.embed(images)
    expected_BC = torch.stack(
        [reference_logits(theirs, bank, x_BD[b], z_Bd[b], int(i)) for b, i in enumerate(SEEDS)]
    )
    torch.testing.assert_close(out.logits_BC, expected_BC)
    assert not torch.allclose(out.logits_BC, out.self_logits_BC)
    assert ((out.weights_BF > 0).sum(1) == K).all()
    assert out.degenerate == 0
    assert out.scale > 0

    upstream_BC = torch.randn(len(SEEDS), C, dtype=torch.float64)
    (out.logits_BC * upstream_BC).sum().backward()
    (expected_BC * upstream_BC).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    assert ours.head is not None
    assert ours.head.project.weight.grad.abs().sum() > 0  # the graph is learned


def test_unseen_images_equal_the_dense_reference() -> None:
    bank, made = Bank(), student("dataset").eval()
    images = make_images(3)
    seeds_B = torch.full((3,), -1)
    out = made(images, bank.block(seeds_B, torch.arange(M).expand(3, M)))
    expected_BC = torch.stack(
        [reference_logits(made, bank, out.x_BD[b], out.z_Bd[b], -1) for b in range(3)]
    )
    torch.testing.assert_close(out.logits_BC, expected_BC)


def test_a_seeds_own_label_and_features_do_not_reach_it() -> None:
    bank, made = Bank(), student("dataset").eval()
    images = make_images(len(SEEDS))
    before = made(images, bank.block(SEEDS)).logits_BC
    reached = 0
    for b, i in enumerate(SEEDS):
        other = Bank()
        other.labels_N[i] = (other.labels_N[i] + 2) % C
        other.x_ND[i] += 1.0
        after = made(images, other.block(SEEDS)).logits_BC
        torch.testing.assert_close(after[b], before[b])
        reached += int(not torch.allclose(after, before))
    assert reached > 0  # while they do reach other seeds


def test_a_seed_among_its_own_candidates_is_left_out() -> None:
    bank, made = Bank(), student("dataset").eval()
    images = make_images(len(SEEDS))
    first_BF = bank.table_NM[SEEDS]
    with_self = torch.cat([SEEDS[:, None], first_BF], 1)
    plain = made(images, bank.block(SEEDS))
    block = bank.block(SEEDS, with_self)
    out = made(images, block)
    assert (out.weights_BF[:, 0] == 0).all()
    torch.testing.assert_close(out.weights_BF[:, 1:], plain.weights_BF)
    torch.testing.assert_close(out.logits_BC, plain.logits_BC)
    assert (block.first_labels_BF()[:, 0] == -1).all()
    assert torch.equal(block.first_labels_BF()[:, 1:], bank.labels_N[first_BF])


def test_empty_slots_equal_fewer_candidates() -> None:
    bank, made = Bank(), student("dataset").eval()
    images = make_images(len(SEEDS))
    nodes = bank.nodes(SEEDS)
    none_B2 = torch.full((len(SEEDS), 2), -1)
    none_U1 = torch.full((len(nodes["first_U"]), 1), -1)
    padded = block_of(
        nodes,
        row_of_BF=torch.cat([none_B2, nodes["row_of_BF"]], 1),
        second_UG=torch.cat([none_U1, nodes["second_UG"]], 1),
    )
    plain = made(images, block_of(nodes))
    torch.testing.assert_close(made(images, padded).logits_BC, plain.logits_BC)


def test_a_node_among_its_own_candidates_is_no_neighbour_of_itself() -> None:
    bank, made = Bank(), student("dataset").eval()
    images = make_images(len(SEEDS))
    nodes = bank.nodes(SEEDS)
    loops = torch.cat([nodes["first_U"][:, None], nodes["second_UG"]], 1)
    looped = made(images, block_of(nodes, second_UG=loops))
    torch.testing.assert_close(looped.logits_BC, made(images, block_of(nodes)).logits_BC)


def test_unseen_images_with_empty_slots_in_the_second_hop() -> None:
    bank, made = Bank(), student("dataset").eval()
    images = make_images(3)
    nodes = bank.nodes(torch.full((3,), -1), torch.arange(M).expand(3, M))
    none_U1 = torch.full((len(nodes["first_U"]), 1), -1)
    padded = block_of(nodes, second_UG=torch.cat([none_U1, nodes["second_UG"]], 1))
    plain = made(images, block_of(nodes))
    torch.testing.assert_close(made(images, padded).logits_BC, plain.logits_BC)


def test_a_seed_without_candidates_has_no_neighbours() -> None:
    bank, made = Bank(), student("dataset").eval()
    nodes = bank.nodes(SEEDS)
    nodes["row_of_BF"][1] = -1
    out = made(make_images(len(SEEDS)), block_of(nodes))
    torch.testing.assert_close(out.logits_BC[1], out.self_logits_BC[1])
    assert out.logits_BC.isfinite().all()


def test_candidates_may_be_asked_for_with_the_live_projection() -> None:
    bank, made = Bank(), student("dataset").eval()
    images = make_images(len(SEEDS))
    asked: list[Tensor] = []

    class Query:
        def block(self, z_Bd: Tensor) -> Block:
            asked.append(z_Bd)
            return bank.block(SEEDS).to("cpu")

    out = made(images, Query())
    torch.testing.assert_close(out.logits_BC, made(images, bank.block(SEEDS)).logits_BC)
    assert torch.equal(asked[0], out.z_Bd)
    assert not asked[0].requires_grad
    assert torch.equal(out.first_labels_BF, bank.labels_N[bank.table_NM[SEEDS]])


def test_gates_at_zero_give_the_self_path() -> None:
    bank, images = Bank(), make_images(len(SEEDS))
    for scope in ("batch", "dataset"):
        made = student(scope, gates=False)
        out = made(images, bank.block(SEEDS) if scope == "dataset" else None)
        assert torch.equal(out.logits_BC, out.self_logits_BC)


def test_scopes_share_the_self_path() -> None:
    images = make_images(6)
    control = student("none")
    self_path = control(images).logits_BC
    for scope in ("batch", "dataset"):
        made = student(scope)
        shared = {n: p for n, p in control.state_dict().items() if n in made.state_dict()}
        assert len(shared) == len(control.state_dict())
        made.load_state_dict(shared, strict=False)
        torch.testing.assert_close(made(images).self_logits_BC, self_path)


@pytest.mark.parametrize("stem", ["resnet_tiny", "conv3"])
def test_control_and_student_begin_with_the_same_weights(stem: str) -> None:
    """The graph's own parameters are drawn last, so that they don't change the others."""
    config = Config(student=StudentConfig(stem=stem))
    states = {}
    for scope in ("none", "batch", "dataset"):
        torch.manual_seed(config.seed)
        states[scope] = build_student(config, 10, scope).state_dict()
    control = states["none"]
    for scope in ("batch", "dataset"):
        assert set(control) < set(states[scope])
        for name, tensor in control.items():
            assert torch.equal(states[scope][name], tensor), (scope, name)


@pytest.mark.parametrize("self_loss", [0.0, 0.5, 2.0])
def test_the_loss_is_as_large_as_the_controls(self_loss: float) -> None:
    """At gates of zero the student is its self path: the same loss, and the same gradient."""
    settings = StudentConfig(self_loss=self_loss)
    bank, images = Bank(), make_images(len(SEEDS))
    labels = bank.labels_N[SEEDS]
    soft = torch.randn(len(SEEDS), C, dtype=torch.float64).log_softmax(1)
    made, control = student("dataset", gates=False), student("none")
    control.load_state_dict({n: made.state_dict()[n] for n in control.state_dict()})
    losses = []
    for model, block in ((made, bank.block(SEEDS)), (control, None)):
        loss_B = loss_of(model(images, block), labels, soft, settings)
        loss_B.sum().backward()
        losses.append(loss_B)
    torch.testing.assert_close(*losses)
    shared = dict(made.named_parameters())
    for name, parameter in control.named_parameters():
        torch.testing.assert_close(shared[name].grad, parameter.grad, msg=name)


def test_the_terms_keep_their_weights() -> None:
    """(graph + s · self + n · neighbors) / (1 + s), written out."""
    settings = StudentConfig(self_loss=0.5, neighbour_loss=0.25, distill_weight=0.0)
    bank, made = Bank(), student("dataset").eval()
    labels = bank.labels_N[SEEDS]
    out = made(make_images(len(SEEDS)), bank.block(SEEDS))
    cross = [
        nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        for logits in (out.logits_BC, out.self_logits_BC)
    ]
    near = neighbour_loss(out.weights_BF, out.first_labels_BF, labels)
    expected = (cross[0] + 0.5 * cross[1] + 0.25 * near) / 1.5
    soft = torch.zeros(len(SEEDS), C).log_softmax(1)
    torch.testing.assert_close(loss_of(out, labels, soft, settings), expected)


def test_control_has_no_graph_parameters() -> None:
    control = student("none")
    assert control.graph_parameters() == {}
    assert {n.split(".")[0] for n, _ in control.named_parameters()} == {"stem", "gnn"}
    out = control(make_images(4))
    assert out.weights_BF is None
    assert torch.equal(out.logits_BC, out.self_logits_BC)
    torch.testing.assert_close(out.z_Bd.norm(dim=1), torch.ones(4))
    full = student("dataset")
    added = set(dict(full.named_parameters())) - set(dict(control.named_parameters()))
    assert added == set(full.graph_parameters())
    assert student("batch", label_dim=E).gnn.label_dim == 0  # no labels inside a batch


def test_batch_scope_equals_dense() -> None:
    made = student("batch")
    images = make_images(10)
    out: StudentOutput = made(images)
    gnn, x_BD = made.gnn, out.x_BD
    rows = []
    for i in range(10):
        others = torch.tensor([j for j in range(10) if j != i])
        row = torch.zeros(10, dtype=torch.float64)
        d_M = (out.z_Bd[i] - out.z_Bd[others]).square().sum(1)
        rows.append(row.scatter(0, others, reference_row(d_M, K)))
    p_BB = torch.stack(rows)
    torch.testing.assert_close(out.weights_BF, p_BB)
    h_BH = torch.relu(gnn.self1(x_BD) + gnn.gate1 * gnn.neighbour1(p_BB @ x_BD))
    expected_BC = gnn.self2(h_BH) + gnn.gate2 * gnn.neighbour2(p_BB @ h_BH)
    torch.testing.assert_close(out.logits_BC, expected_BC)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_batch_scope_with_fewer_images_than_neighbours(count: int) -> None:
    out = student("batch", k=5)(make_images(count))
    torch.testing.assert_close(out.weights_BF.sum(1), torch.ones(count).double())
    assert (out.weights_BF.diagonal() == 0).all()
    assert out.logits_BC.isfinite().all()


def test_batch_scope_of_identical_images_counts_degenerate_rows() -> None:
    made = student("batch").eval()
    out = made(make_images(1).expand(8, 8, 8, 3))
    assert out.degenerate == 8
    assert out.scale == 0
    out.logits_BC.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("scope", ["none", "batch", "dataset"])
@pytest.mark.parametrize("with_block", [False, True])
def test_every_parameter_gets_a_gradient(scope: Scope, with_block: bool) -> None:
    """ZeRO and DDP need every gradient; during warm-up those of the graph are zero."""
    bank, made = Bank(), student(scope)
    block = bank.block(SEEDS) if with_block and scope == "dataset" else None
    assert made.head is None or made.head.norm.num_batches_tracked == 0
    out = made(make_images(len(SEEDS)), block)
    out.logits_BC.sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
    if scope == "dataset" and block is None:
        assert torch.equal(out.logits_BC, out.self_logits_BC)
        assert all((p.grad == 0).all() for p in made.graph_parameters().values())
        assert made.head is not None
        assert made.head.norm.num_batches_tracked == 1  # its statistics have been updated


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="galaxy"):
        student("galaxy")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="k = 0"):
        student("batch", k=0)
