"""A linear head on frozen features: multinomial logistic regression with an L2 penalty, on all cores or one.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

L2 = 1e-2
"""Penalty on the squared weights of standardized features, per image: strong enough that the head can't
memorize wrong labels."""
MOST_IMAGES = 200_000
"""Most images that the head is fitted on, spread evenly: more would change little."""
ROUNDS, ROWS = 60, 16_384


class LinearHead:
    """Weights [D, C] and biases [C] over standardized features."""

    def __init__(self, mean_D: Tensor, scale_D: Tensor, weight_DC: Tensor, bias_C: Tensor) -> None:
        self.mean_D, self.scale_D, self.weight_DC, self.bias_C = mean_D, scale_D, weight_DC, bias_C

    def probabilities(self, x_ND: np.ndarray) -> np.ndarray:
        """Softmax outputs, [N, C] float32."""
        found = np.empty((len(x_ND), len(self.bias_C)), np.float32)
        for start in range(0, len(x_ND), ROWS):
            x = self._standard(x_ND[start : start + ROWS])
            found[start : start + ROWS] = (x @ self.weight_DC + self.bias_C).softmax(1).numpy()
        return found

    def _standard(self, x_ND: np.ndarray) -> Tensor:
        return (torch.from_numpy(np.asarray(x_ND, np.float32)) - self.mean_D) / self.scale_D


def fit_head(
    x_ND: np.ndarray, labels_N: np.ndarray, classes: int, *, l2: float = L2, seed: int = 0
) -> LinearHead:
    """Minimize mean cross-entropy + l2/2 · ‖W‖² by L-BFGS; deterministic.

    Images with a label below 0 are left out. Classes without images get probability near 0.

    Raises:
        ValueError: no image has a label.
    """
    rows = np.flatnonzero(np.asarray(labels_N) >= 0)
    if not len(rows):
        raise ValueError("no image has a label")
    if len(rows) > MOST_IMAGES:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_IMAGES, replace=False))
    x = torch.from_numpy(np.asarray(x_ND[rows], np.float32))
    y = torch.from_numpy(np.asarray(labels_N[rows], np.int64))
    mean_D = x.mean(0)
    scale_D = x.std(0, correction=0)
    scale_D = torch.where(scale_D > 1e-6, scale_D, torch.ones_like(scale_D))
    x = (x - mean_D) / scale_D
    weight_DC = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias_C = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_DC, bias_C],
        max_iter=ROUNDS,
        tolerance_grad=1e-6,
        tolerance_change=1e-8,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight_DC + bias_C, y) + l2 / 2 * weight_DC.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearHead(mean_D, scale_D, weight_DC.detach(), bias_C.detach())


def head_probabilities(
    x_ND: np.ndarray,
    labels_N: np.ndarray,
    classes: int,
    *,
    folds: int = 0,
    l2: float = L2,
    seed: int = 0,
) -> np.ndarray:
    """Probabilities [N, C] of every image, by a head fitted on all of them (``folds`` 0) or on the other folds.

    Raises:
        ValueError: no image has a label, or ``folds`` is 1 or negative.
    """
    if folds == 0:
        return fit_head(x_ND, labels_N, classes, l2=l2, seed=seed).probabilities(x_ND)
    if folds < 2:
        raise ValueError(f"folds = {folds}: none (0) or at least 2")
    fold_N = np.random.default_rng(seed).permutation(len(x_ND)) % folds
    found_NC = np.empty((len(x_ND), classes), np.float32)
    for fold in range(folds):
        mine = fold_N == fold
        head = fit_head(x_ND[~mine], np.asarray(labels_N)[~mine], classes, l2=l2, seed=seed)
        found_NC[mine] = head.probabilities(x_ND[mine])
    return found_NC
