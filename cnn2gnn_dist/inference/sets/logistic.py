"""Logistic regression in a few dimensions, by Newton's method. Pure."""

from __future__ import annotations

import numpy as np

RIDGE = 1e-5
"""Keeps rows that a hyperplane separates from sending the weights to infinity."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def fit_balanced(rows_PK: np.ndarray, positive_P: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [K] and intercept of σ(w·row + b); both kinds of rows have the same total weight.

    Args:
        rows_PK: float64.
        positive_P: bool; P(positive | row) is fitted.
    """
    weight_P = np.where(
        positive_P, 0.5 / max(positive_P.sum(), 1), 0.5 / max((~positive_P).sum(), 1)
    )
    design_P = np.column_stack([rows_PK, np.ones(len(rows_PK))])
    ridge = np.r_[np.full(rows_PK.shape[1], RIDGE), 0.0]
    solution = np.zeros(len(ridge))
    for _ in range(50):
        p_P = sigmoid(design_P @ solution)
        gradient = design_P.T @ (weight_P * (p_P - positive_P)) + ridge * solution
        curvature = (design_P * (weight_P * p_P * (1 - p_P))[:, None]).T @ design_P
        step = np.linalg.solve(curvature + np.diag(np.maximum(ridge, 1e-12)), gradient)
        step *= min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-300))
        solution -= step
        if np.abs(step).max() < 1e-10:
            break
    return solution[:-1], float(solution[-1])
