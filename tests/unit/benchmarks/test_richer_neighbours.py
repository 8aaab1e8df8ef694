"""What neighbors say, and the choice of how much to believe it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.benchmarks import benchmark

richer_neighbours = benchmark("richer_neighbours")
sets = benchmark("remembering.sets")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(richer_neighbours, "NEIGHBOURS", (2, 3))
    monkeypatch.setattr(richer_neighbours, "TAUS", (0.1, 1.0))
    monkeypatch.setattr(richer_neighbours, "CHUNK", 2)


def directions(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    lengths = torch.arange(1, len(degrees) + 1)[:, None]  # cosines: lengths don't matter
    return lengths * torch.stack([angles.cos(), angles.sin()], 1)


@pytest.mark.usefixtures("small")
def test_neighbours_say_the_softmax_weighted_mean_of_their_values() -> None:
    """By hand: a query at 0 degrees sees nodes at 10, 30 and 60; the one at 180 is never among three."""
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [9.0, 9.0]], dtype=torch.float64)
    found = dict(
        richer_neighbours.said_by_neighbours(
            directions(0, 20, 59), directions(10, 30, 60, 180), {"what": values}
        )
    )
    assert found.keys() == {(k, tau, "what") for k in (2, 3) for tau in (0.1, 1.0)}
    cosines = np.cos(np.deg2rad([10, 30, 60]))
    for (k, tau, _), said in found.items():
        weight = np.exp(cosines[:k] / tau)
        wanted = weight / weight.sum() @ values.numpy()[:k]
        np.testing.assert_allclose(said[0].numpy(), wanted)
    np.testing.assert_allclose(found[2, 0.1, "what"][1].numpy(), [0.5, 0.5])  # both 10 away
    assert found[2, 0.1, "what"][2, 1] > 1.4  # its nearest is the node that says 2


@pytest.mark.usefixtures("small")
def test_strength_is_chosen_on_calibration_images_and_used_on_test_images() -> None:
    """Neighbors that are right on the calibration images are believed, those that are wrong are not."""
    bank = directions(0, 10, 20, 90, 100, 110)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    right = torch.nn.functional.one_hot(labels, 2).double()
    unsure = torch.tensor([[0.1, 0.0], [0.1, 0.0]], dtype=torch.float64)
    calibration = {"self": unsure, "labels": torch.tensor([0, 1])}
    test = {"self": unsure.flip(1), "labels": torch.tensor([0, 0])}
    queries = {"calibration": directions(10, 100), "test": directions(10, 105)}
    found = richer_neighbours.right_with(
        queries, bank, calibration, test, {"right": right, "wrong": right.flip(1)}
    )
    (*_, beta), answers = found["right"]
    assert beta == max(richer_neighbours.BETAS)
    assert answers.tolist() == [True, False]  # as the neighbors say, against its own answer
    (*_, beta), answers = found["wrong"]
    assert beta == 0
    assert answers.tolist() == [False, False]  # its own answer


def test_a_linear_head_is_a_penalized_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(60, 4)), rng.integers(0, 3, 60)
    weight, bias = richer_neighbours.linear_head(
        torch.zeros(60, 3), torch.from_numpy(inputs).float(), torch.from_numpy(labels), 0.05
    )
    wanted = LogisticRegression(C=1 / (2 * 60 * 0.05), tol=1e-8, max_iter=1000).fit(inputs, labels)
    np.testing.assert_allclose(weight.numpy(), wanted.coef_.T, atol=2e-3)
    # What the offset says already is not learned once more.
    scores = torch.from_numpy(inputs).float() @ weight + bias
    more, _ = richer_neighbours.linear_head(
        scores, torch.from_numpy(inputs).float(), torch.from_numpy(labels), 1e3
    )
    assert more.abs().max() < 1e-3


def test_a_head_uses_the_better_of_its_inputs_and_none_that_tells_nothing() -> None:
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(0, 2, 200))
    noise = torch.from_numpy(rng.normal(size=(200, 3))).float()
    telling = noise + 4 * labels[:, None]
    unsure = {"self": torch.zeros(200, 2), "labels": labels}
    inputs = [("noise, ", noise, noise), ("telling, ", telling, telling)]
    choice, right = richer_neighbours.right_with_a_head(iter(inputs), unsure, unsure)
    assert choice.startswith("telling, ")
    assert right.float().mean() > 0.98
    sure = {"self": 8.0 * torch.nn.functional.one_hot(labels, 2), "labels": labels}
    choice, right = richer_neighbours.right_with_a_head(iter(inputs[:1]), sure, sure)
    assert right.all()


def test_sets_have_each_of_their_classes_and_no_image_twice() -> None:
    labels = np.repeat(np.arange(20), 70)
    for size, classes in sets.SETS:
        rows = sets.drawn(labels, size, classes, np.random.default_rng(1))
        assert len(set(rows.tolist())) == size
        assert not classes or len(set(labels[rows].tolist())) == classes


@pytest.mark.parametrize(
    ("kind", "burst"),
    [
        ("a burst among strangers", 8),
        ("all but one of a class", 15),
        ("a class in three, ten others", 5),
    ],
)
def test_the_new_kinds_of_sets_are_as_they_are_called(kind: str, burst: int) -> None:
    labels = np.repeat(np.arange(20), 70)
    rows = sets.drawn_new(kind, labels, 16, np.random.default_rng(2))
    assert len(set(rows.tolist())) == 16
    counts = np.bincount(labels[rows], minlength=20)
    assert counts[labels[rows[0]]] == burst
    assert (labels[rows[:burst]] == labels[rows[0]]).all()
    if "ten others" in kind:
        assert (counts > 0).sum() <= 11
