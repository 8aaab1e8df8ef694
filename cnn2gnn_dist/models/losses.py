"""The student's losses, one value per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR = -1e4  # replaces a teacher log-probability of −inf: 0 · −inf would be NaN


def distillation_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    teacher_log_probs_BC: Tensor | None,
    *,
    weight: float,
    temperature: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(1 − λ)·CE(y, label) + λ·T²·KL(softmax(t/T) ‖ softmax(y/T)), after Hinton et al., 2015.

    Args:
        logits_BC: the student's y, any float dtype; computed in float32 (or float64).
        labels_B: int64; -1 = none: the sample has only the second term.
        teacher_log_probs_BC: log-softmax of the teacher's logits t; used in place of t, from which it
            differs by a constant per row. None: plain cross-entropy, regardless of ``weight``.
        weight: λ in 0..1.
        temperature: T > 0.
        label_smoothing: of the cross-entropy.

    Returns:
        loss_B, float32 (float64 for float64 logits), not reduced.
    """
    if logits_BC.dtype != torch.float64:
        logits_BC = logits_BC.float()
    ce_B = F.cross_entropy(
        logits_BC, labels_B, reduction="none", ignore_index=-1, label_smoothing=label_smoothing
    )
    if teacher_log_probs_BC is None:
        return ce_B
    t_BC = teacher_log_probs_BC.to(logits_BC.dtype).clamp(min=_FLOOR)
    target_BC = F.log_softmax(t_BC / temperature, dim=1)
    student_BC = F.log_softmax(logits_BC / temperature, dim=1)
    kl_B = F.kl_div(student_BC, target_BC, reduction="none", log_target=True).sum(1)
    return (1.0 - weight) * ce_B + weight * temperature**2 * kl_B


def neighbour_loss(
    weights_BF: Tensor, labels_of_BF: Tensor, labels_B: Tensor, *, floor: float = 1e-4
) -> Tensor:
    """−log of the weight on neighbors of the seed's own class, loss_B: trains the graph head.

    Args:
        weights_BF: p_ij over the neighbor slots.
        labels_of_BF: their labels, -1 = unknown or padding.
        labels_B: the seeds' labels, -1 = unknown.
        floor: the weight below which a row is ignored: it has no gradient.

    Rows in which the seed or all neighbors have no label give 0.
    """
    same_BF = (labels_of_BF == labels_B.unsqueeze(1)) & (labels_of_BF >= 0)
    known_B = ((labels_of_BF >= 0) & (weights_BF > 0)).any(1) & (labels_B >= 0)
    mass_B = torch.where(same_BF, weights_BF, 0.0).sum(1)
    return torch.where(known_B, -mass_B.clamp(min=floor, max=1.0).log(), 0.0)


def logit_adjustment(shares_C: Tensor, tau: float) -> Tensor:
    """τ·log π of each class [C] float32, π its share of the targets; added to logits in training only.

    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10. What is learned is then
    y = log p(class | image) - τ log π: answers from y weigh all classes equally (τ = 1). A teacher trained
    without it has learned y + τ log π, so its soft targets match the adjusted logits too.
    """
    return (tau * shares_C.double().log()).float()


def target_shares(
    labels_N: Tensor,
    mean_soft_C: Tensor | None,
    num_classes: int,
    *,
    weight: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Each class's share [C] float64 of the targets that ``distillation_loss`` teaches; they sum to 1.

    Smoothed targets give every class at least a share of ε/C, and so does the teacher that was trained with
    them. Were rare classes adjusted by their share of the labels, every image that such targets
    say nothing about would be answered with the rarest class.

    Args:
        labels_N: -1 = none. A class without images counts as having one.
        mean_soft_C: the mean of the N images' soft targets; None: they are not used.
        num_classes: C.
        weight: λ, of the soft targets.
        label_smoothing: ε, of the labels.
    """
    known_N = labels_N[labels_N >= 0].long()
    images_C = torch.bincount(known_N, minlength=num_classes).clamp(min=1).double()
    labels_C = (1.0 - label_smoothing) * images_C / images_C.sum() + label_smoothing / num_classes
    if mean_soft_C is None:
        return labels_C
    total_C = (1.0 - weight) * len(known_N) * labels_C + weight * len(labels_N) * mean_soft_C
    return total_C / total_C.sum()
