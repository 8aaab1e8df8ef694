"""The learning rate over the course of training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cnn2gnn_dist.config import TeacherConfig
from cnn2gnn_dist.stages.shared.scheduled_values import rate_at, share_kept, slow_average
from cnn2gnn_dist.training.schedule import (
    fresh_adam,
    kept_at,
    late_lr_at,
    late_share,
    lr_at,
    peaked_lr_at,
    size_at,
)


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


@pytest.mark.parametrize(("steps", "peak_at"), [(40, 0.3), (100, 0.25), (11, 0.5)])
def test_one_cycle_is_torchs(steps: int, peak_at: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=steps, pct_start=peak_at, div_factor=25, final_div_factor=1e4
    )
    top = (peak_at * steps - 1) / (steps - 1)  # torch's peak and last step come one step early
    for step in range(steps):
        found = peaked_lr_at("one_cycle", step, steps - 1, 0.5, peak_at=top)
        assert found == pytest.approx(reference.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        reference.step()


def test_the_shape_of_one_cycle_is_torchs_too() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2.0, total_steps=21, pct_start=0.4, div_factor=5, final_div_factor=10
    )
    for step in range(21):
        found = peaked_lr_at("one_cycle", step, 20, 2.0, 0.2, (0.4 * 21 - 1) / 20, 0.02)
        assert found == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()


def test_the_triangle_is_airbenchs() -> None:
    """Compared with numpy.interp over its corners."""
    for step in range(101):
        corners = np.interp(step, [0, 23, 100], [0.2, 1.0, 0.07])
        assert peaked_lr_at("triangular", step, 100, 3.0) == pytest.approx(3.0 * corners)
    assert peaked_lr_at("triangular", 50, 100, 1.0, 0, 0.5, 0) == 1.0
    assert peaked_lr_at("triangular", 200, 100, 1.0, 0, 0.5, 0.25) == 0.25


def test_late_parameters_climb_from_zero_to_the_ordinary_rate() -> None:
    assert [late_share(s, 2, 2) for s in (1.9, 2, 3, 4, 5)] == [0, 0, 0.5, 1, 1]
    assert late_share(2, 2, 0) == 1


def test_an_average_keeps_more_as_training_goes_on() -> None:
    assert kept_at(0.3, 0.9, 1, 0) == 0.9
    assert kept_at(1.0, 0.95, 5, 3) == pytest.approx(0.95**5)
    assert kept_at(0.5, 0.95, 5, 3) == pytest.approx(0.95**5 / 8)


def test_images_are_small_in_the_first_epochs() -> None:
    assert [size_at(e, 10, 32, 24, 0.6) for e in (0, 5, 6, 9)] == [24, 24, 32, 32]
    assert [size_at(e, 3, 32, 24, 0.5) for e in range(3)] == [24, 24, 32]
    assert {size_at(e, 10, 32, None, 0.6) for e in range(10)} == {32}


@pytest.mark.parametrize("ramp", [0.0, 0.5])
@pytest.mark.parametrize(
    ("decay", "every", "steps"), [(0.99, 5, 18), (0.9, 1, 25), (0.999, 7, 700)]
)
def test_the_share_of_the_initial_weights_in_an_average(
    decay: float, every: int, steps: int, ramp: float
) -> None:
    """Against an average of 1 at the start, and 0 in every step, as it is updated."""
    average = 1.0
    settings = TeacherConfig(
        epochs=1, average="ema", average_decay=decay, average_every=every, average_ramp=ramp
    )
    for step in range(1, steps + 1):
        kept = share_kept(settings, step / steps, step)
        average *= 1.0 if kept is None else kept
    said = slow_average(settings, steps)
    assert (said is None) == (average < 0.05)
    if not ramp and said is not None:  # else the last update may be before the end
        assert f"{average:.0%} of the average" in said


@pytest.mark.parametrize("ramp", [0.0, 2.0])
def test_an_average_of_late_parameters_has_fewer_updates(ramp: float) -> None:
    """Gates start at 0: an average with a third of their initial values has them a third too small."""
    settings = TeacherConfig(average="ema", epochs=1, average_ramp=ramp)
    late, steps = 400, 500
    kept = [share_kept(settings, step / steps, step) or 1.0 for step in range(late + 1, steps + 1)]
    assert slow_average(settings, steps) is None
    assert slow_average(settings, steps, 100) is None
    said = slow_average(settings, steps, late)
    wanted = float(np.prod(kept))
    assert (said is not None) == (wanted > 0.05) == (not ramp)
    if said is not None:
        assert f"{wanted:.0%} of the average of the graph's parameters" in said
    assert slow_average(settings, steps, steps) is None  # never starts, which a note says


def test_other_averages_are_not_slow() -> None:
    assert slow_average(TeacherConfig(average="none"), 10) is None
    assert slow_average(TeacherConfig(average="ema", average_decay=0), 10) is None
    said = slow_average(TeacherConfig(average="ema"), 4)  # never updated
    assert said is not None
    assert "100% of the average" in said


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        (
            {},
            "4.9%",
        ),  # the defaults, which suit ema: the demo's teacher stays at 10 % instead of 88
        ({"average_decay": 0.95, "average_ramp": 3}, None),  # airbench's
        ({"average_decay": 0.87}, None),  # as its inventors have it: half of it
        ({"average_decay": 0.99, "average_ramp": 1}, None),
        ({"average_decay": 0.98, "average_every": 1}, "2.0%"),
    ],
)
def test_a_lookahead_that_hardly_moves_is_named(settings: dict, moved: str | None) -> None:
    """Its share is the mean over the steps, weighed by nothing: by hand."""
    config = TeacherConfig(average="lookahead", epochs=1, **settings)
    steps = 1000 * config.average_every
    kept = [share_kept(config, step / steps, step) for step in range(1, steps + 1)]
    mean = 1 - np.mean([one for one in kept if one is not None])
    said = slow_average(config, steps)
    assert (said is None) == (mean >= 0.1) == (moved is None)
    if said is not None:
        assert f"keeps {mean:.1%}" in said
        assert moved is not None
        assert moved in said


SHAPE = {"lr_start": 0.1, "lr_peak_at": 0.4, "lr_final": 0.02}


@pytest.mark.parametrize("position", [0.0, 0.1, 0.25, 0.4, 0.55, 0.8, 1.0])
@pytest.mark.parametrize("schedule", ["triangular", "one_cycle"])
def test_the_configured_shape_is_that_of_the_rate(schedule: str, position: float) -> None:
    """Between a tenth of 2 at the start, 2 after four of ten epochs, and a fiftieth of it at the end."""
    rising = position < 0.4
    share = position / 0.4 if rising else (position - 0.4) / 0.6
    if schedule == "one_cycle":
        share = (1 - math.cos(math.pi * share)) / 2
    wanted = 0.2 + share * 1.8 if rising else 2.0 - share * 1.96
    settings = TeacherConfig(epochs=10, lr=2.0, schedule=schedule, **SHAPE)
    assert rate_at(settings, 10 * position, 1.0) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("epochs", "wanted"), [(0.5, 0.5), (1, 1.0), (2, 2.0), (6, 1.0), (4, 1.7071), (10, 0.0)]
)
def test_a_cosine_falls_from_the_end_of_its_warm_up(epochs: float, wanted: float) -> None:
    """By hand: a warm-up of two of ten epochs to 2, then half a cosine over eight."""
    settings = TeacherConfig(epochs=10, lr=2.0, schedule="cosine")
    assert rate_at(settings, epochs, 2.0) == pytest.approx(wanted, abs=1e-4)
