"""The learning rate over training."""

from __future__ import annotations

import math

import pytest
import torch

from cnn2gnn_dist.training.schedule import lr_at


def test_warm_up_is_a_line_through_zero() -> None:
    assert [lr_at(s, 10, 1.0, 4) for s in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_peak_comes_at_once_without_warm_up() -> None:
    assert lr_at(0, 10, 0.3, 0) == 0.3


@pytest.mark.parametrize("final", [0.0, 0.01])
def test_the_cosine_is_torchs(final: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=final)
    for step in range(20):
        assert lr_at(step + 5, 25, 0.5, 5, final) == pytest.approx(
            reference.get_last_lr()[0], abs=1e-9
        )
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("step", [10, 10.5, 1000])
def test_it_stays_at_the_end(step: float) -> None:
    assert lr_at(step, 10, 1.0, 2, 0.125) == pytest.approx(0.125)


def test_units_do_not_matter() -> None:
    for step in range(0, 101, 7):
        assert lr_at(step, 100, 0.2, 10) == pytest.approx(lr_at(step / 50, 2, 0.2, 0.2))


def test_a_run_that_is_warm_up_only() -> None:
    rates = [lr_at(s, 4, 1.0, 4) for s in range(6)]
    assert all(math.isfinite(rate) for rate in rates)
    assert rates[:4] == [0.0, 0.25, 0.5, 0.75]
