"""The learning rate over training."""

from __future__ import annotations

import math

import pytest
import torch

from cnn2gnn_dist.training.schedule import fresh_adam, late_lr_at, lr_at


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


def test_late_parameters_begin_on_a_line_of_their_own() -> None:
    def rate(step: float, warmup: float = 1.0) -> float:
        return late_lr_at(step, 12, 1.0, 1.0, 4, warmup)

    assert [rate(s) for s in (0, 2, 3.99)] == [0.0] * 3
    for share in (0.0, 0.25, 0.5, 1.0):
        assert rate(4 + share) == pytest.approx(share * lr_at(4 + share, 12, 1.0, 1.0))
    assert rate(7) == lr_at(7, 12, 1.0, 1.0)
    assert rate(4, warmup=0.0) == lr_at(4, 12, 1.0, 1.0)


def test_a_late_start_at_the_beginning_is_no_second_warm_up() -> None:
    for step in (0, 0.25, 0.5, 1, 3):
        assert late_lr_at(step, 12, 1.0, 1.0, 0, 1.0) == lr_at(step, 12, 1.0, 1.0)
        slower = late_lr_at(step, 12, 1.0, 1.0, 0, 2.0)
        assert slower <= lr_at(step, 12, 1.0, 1.0)
    assert late_lr_at(0.5, 12, 1.0, 1.0, 0, 2.0) == pytest.approx(0.25)


@pytest.mark.parametrize("late", [0, 1, 40, 1500])
def test_a_late_adam_steps_as_a_fresh_one(late: int) -> None:
    """Compare torch's Adam after ``late`` idle steps with a fresh one."""
    torch.manual_seed(0)
    betas = (0.9, 0.999)
    old, new = (torch.nn.Parameter(torch.zeros(5)) for _ in range(2))
    idle = torch.optim.Adam([old], lr=0.0, betas=betas)
    fresh = torch.optim.Adam([new], lr=0.01, betas=betas)
    for _ in range(late):
        old.grad = torch.zeros(5)
        idle.step()
    for since in range(1, 30):
        old.grad = new.grad = torch.randn(5)
        idle.param_groups[0]["lr"] = 0.01 * fresh_adam(late + since, since, betas)
        idle.step()
        fresh.step()
        torch.testing.assert_close(old, new, rtol=1e-4, atol=1e-6)
