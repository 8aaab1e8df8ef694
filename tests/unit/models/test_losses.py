"""Losses compared with torch's own functions and with the formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cnn2gnn_dist.models.losses import (
    distillation_loss,
    logit_adjustment,
    neighbour_loss,
    target_shares,
)


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64) * 2
    teacher = torch.randn(6, 5, dtype=torch.float64) * 3
    return logits, torch.randint(0, 5, (6,)), teacher


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_distillation_equals_the_formula(
    weight: float, temperature: float, smoothing: float
) -> None:
    logits, labels, teacher = case()
    loss_B = distillation_loss(
        logits,
        labels,
        teacher.log_softmax(1),  # log-probabilities serve as logits
        weight=weight,
        temperature=temperature,
        label_smoothing=smoothing,
    )
    q = (teacher / temperature).softmax(1)
    p = (logits / temperature).softmax(1)
    kl_B = (q * (q.log() - p.log())).sum(1)
    target = F.one_hot(labels, 5) * (1 - smoothing) + smoothing / 5
    ce_B = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(loss_B, (1 - weight) * ce_B + weight * temperature**2 * kl_B)


def test_distillation_equals_torch_kl_div() -> None:
    logits, labels, teacher = case()
    loss_B = distillation_loss(logits, labels, teacher.log_softmax(1), weight=1.0, temperature=2.0)
    expected = 4 * F.kl_div(
        (logits / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(loss_B.mean(), expected)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    logits, labels, _ = case()
    loss_B = distillation_loss(logits, labels, None, weight=0.9, temperature=4.0)
    torch.testing.assert_close(loss_B, F.cross_entropy(logits, labels, reduction="none"))


def test_samples_without_a_label_learn_from_the_teacher_only() -> None:
    logits, labels, teacher = case()
    labels[2] = -1
    t = teacher.log_softmax(1)
    loss_B = distillation_loss(logits, labels, t, weight=0.4, temperature=1.0)
    alone_B = distillation_loss(logits, labels.clamp(min=0), t, weight=1.0, temperature=1.0)
    torch.testing.assert_close(loss_B[2], 0.4 * alone_B[2])


def test_gradient_vanishes_at_the_teacher_and_impossible_classes_are_finite() -> None:
    _, labels, teacher = case()
    logits = teacher.clone().requires_grad_()
    t = teacher.log_softmax(1)
    distillation_loss(logits, labels, t, weight=1.0, temperature=3.0).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(teacher), atol=1e-12, rtol=0)

    logits = teacher.clone().requires_grad_()
    t = torch.full_like(teacher, -torch.inf)
    t[:, 0] = 0.0
    loss_B = distillation_loss(logits, labels, t, weight=1.0, temperature=1.0)
    torch.testing.assert_close(loss_B, -teacher.log_softmax(1)[:, 0])
    loss_B.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, labels, teacher = case()
    loss_B = distillation_loss(
        logits.bfloat16(), labels, teacher.log_softmax(1).half(), weight=0.5, temperature=2.0
    )
    assert loss_B.dtype == torch.float32


def test_neighbour_loss_by_hand() -> None:
    weights = torch.tensor(
        [[0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.9, 0.1, 0.0]],
        dtype=torch.float64,
        requires_grad=True,
    )
    labels_of = torch.tensor([[1, 2, 1], [0, 0, 1], [-1, -1, -1], [2, 2, 2], [3, 3, 3]])
    labels = torch.tensor([1, 1, 1, -1, 3])
    loss_B = neighbour_loss(weights, labels_of, labels, floor=1e-4)
    expected = -torch.tensor([0.7, 1e-4, 1.0, 1.0, 1.0], dtype=torch.float64).log()
    torch.testing.assert_close(loss_B, expected)
    loss_B.sum().backward()
    grad = torch.zeros(5, 3, dtype=torch.float64)
    grad[0, 0] = grad[0, 2] = -1 / 0.7
    grad[4, :] = -1.0
    torch.testing.assert_close(weights.grad, grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_equal_torchs_own(smoothing: float) -> None:
    logits, labels, teacher = case()
    labels[4] = -1
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    options = {"weight": 0.7, "temperature": 2.5, "label_smoothing": smoothing}
    distillation_loss(ours, labels, teacher.log_softmax(1), **options).sum().backward()
    ce = F.cross_entropy(
        theirs, labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing
    )
    kl = F.kl_div((theirs / 2.5).log_softmax(1), (teacher / 2.5).softmax(1), reduction="sum")
    (0.3 * ce + 0.7 * 2.5**2 * kl).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_teachers_shift_of_a_row_has_no_influence() -> None:
    logits, labels, teacher = case()
    options = {"weight": 0.5, "temperature": 3.0}
    one = distillation_loss(logits, labels, teacher, **options)
    torch.testing.assert_close(one, distillation_loss(logits, labels, teacher + 7.0, **options))


def test_a_batch_without_any_label_is_finite() -> None:
    logits, labels, _ = case()
    ours = logits.clone().requires_grad_()
    none = torch.full_like(labels, -1)
    loss_B = distillation_loss(ours, none, None, weight=0.5, temperature=1.0)
    assert (loss_B == 0).all()
    loss_B.sum().backward()
    assert ours.grad is not None
    assert (ours.grad == 0).all()
    weights = torch.full((6, 2), 0.5)
    assert (neighbour_loss(weights, torch.zeros(6, 2).long(), none) == 0).all()


def test_unknown_neighbours_of_unknown_seeds_are_no_match() -> None:
    weights = torch.tensor([[0.5, 0.5]], requires_grad=True)
    loss_B = neighbour_loss(weights, torch.tensor([[-1, 3]]), torch.tensor([-1]))
    assert loss_B.tolist() == [0.0]
    loss_B.sum().backward()
    assert weights.grad is not None
    assert (weights.grad == 0).all()


def test_class_0_is_a_class_and_slots_without_weight_are_none() -> None:
    weights = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.7, 0.3000001, 0.0]])
    labels_of = torch.tensor([[0, 2, 0], [-1, 2, 2], [0, 0, 1]])
    loss_B = neighbour_loss(weights, labels_of, torch.tensor([0, 1, 0]))
    assert float(weights[2].sum()) > 1  # by rounding; the loss must not become negative
    torch.testing.assert_close(loss_B, torch.tensor([4.0, 1.0, 1.0]).log(), atol=0, rtol=1e-6)
    assert float(loss_B[2]) == 0.0


def test_logit_adjustment_is_menons_formula() -> None:
    """Equation 10: -log(exp(f_y + t log p_y) / sum_k exp(f_k + t log p_k))."""
    labels_N = torch.tensor([0] * 70 + [1] * 20 + [2] * 10 + [-1] * 40)
    prior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    for tau in (0.5, 1.0, 2.0):
        adjusted = logits + logit_adjustment(target_shares(labels_N, None, 3, weight=0.0), tau)
        found = distillation_loss(adjusted, labels, None, weight=0.0, temperature=1.0)
        powers = prior**tau * logits.exp()
        wanted = -(powers[range(6), labels] / powers.sum(1)).log()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_class_without_images_is_given_one() -> None:
    shares_C = target_shares(torch.tensor([0, 0, 0, 2]), None, 3, weight=0.0)
    found = logit_adjustment(shares_C, 1.0)
    torch.testing.assert_close(found, torch.tensor([0.6, 0.2, 0.2]).log())


def test_shares_are_those_of_the_targets_that_the_loss_teaches() -> None:
    """Against one-hot, smoothed and soft targets, written out and weighed as the loss weighs them."""
    labels_N = torch.tensor([0] * 6 + [1] * 3 + [2] + [-1] * 5)
    soft_NC = torch.randn(15, 3, generator=torch.Generator().manual_seed(3)).softmax(1).double()
    smoothed_NC = 0.8 * F.one_hot(labels_N[:10], 3).double() + 0.2 / 3
    for weight in (0.0, 0.3, 1.0):
        total_C = (1 - weight) * smoothed_NC.sum(0) + weight * soft_NC.sum(0)
        found = target_shares(labels_N, soft_NC.mean(0), 3, weight=weight, label_smoothing=0.2)
        torch.testing.assert_close(found, total_C / total_C.sum())


def test_images_of_which_smoothed_targets_say_nothing_are_not_given_to_the_rarest_class() -> None:
    """What a smoothed teacher says of an image that is surely of class 0: with the labels' shares, class 2 won."""
    labels_N = torch.tensor([0] * 900 + [1] * 99 + [2])
    learned = (0.8 * torch.tensor([1.0, 0.0, 0.0]) + 0.2 / 3).log()
    for smoothing, wanted in ((0.2, 0), (0.0, 2)):
        shares_C = target_shares(labels_N, None, 3, weight=0.0, label_smoothing=smoothing)
        assert int((learned - logit_adjustment(shares_C, 1.0)).argmax()) == wanted


def test_an_adjusted_student_of_a_plain_teacher_learns_the_balanced_logits() -> None:
    """The soft-target loss is minimal where y + log prior are the teacher's logits, at any temperature."""
    adjustment = logit_adjustment(torch.tensor([0.9, 0.1]), 1.0)
    teacher = torch.tensor([[2.0, -1.0]])
    y = teacher - adjustment
    for temperature in (1.0, 4.0):
        loss = distillation_loss(
            y + adjustment,
            torch.tensor([0]),
            teacher.log_softmax(1),
            weight=1.0,
            temperature=temperature,
        )
        assert float(loss) == pytest.approx(0, abs=1e-6)
