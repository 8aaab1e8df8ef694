"""The update that the benchmark of optimizers gives the filters, and what it chooses rates by."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cnn2gnn_dist import settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.stages.shared.networks import Teacher
from tests.support.benchmarks import benchmark

optimizers = benchmark("optimizers")
MUON = optimizers.Trial("muon", 0.25, 0.6, False, False, 5, 0)
SGD = replace(MUON, optimizer="sgd", lr=0.5, momentum=0.85)


@pytest.fixture
def config() -> Config:
    return settings.load(optimizers.RECIPE, ["data.train=/x", "data.test=/x"])


def made(config: Config) -> Teacher:
    torch.manual_seed(3)
    model = Teacher(config, 10)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def weights(model: Teacher) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_muon_moves_all_filters_by_nearly_orthogonal_matrices(config: Config) -> None:
    model = made(config)
    before = weights(model)
    optimizers.Update(model, config, MUON).step(0.5)
    after = weights(model)
    filters = [name for name, p in before.items() if p.ndim == 4]
    assert len(filters) == 6
    for name in filters:
        moved = (before[name] - after[name]).flatten(1) / (0.5 * MUON.lr)
        # The iteration ends with singular values near 1, not at 1; those of the gradient are spread.
        values = torch.linalg.svdvals(moved)
        assert 0.6 < values.min() < values.max() < 1.3
        assert (moved * model.get_parameter(name).grad.flatten(1)).sum() > 0


@pytest.mark.parametrize("trial", [MUON, SGD])
def test_the_other_parameters_follow_sgd_with_nesterov(
    config: Config, trial: optimizers.Trial
) -> None:
    model = made(config)
    before = weights(model)
    optimizers.Update(model, config, trial).step(0.5)
    recipe = config.teacher
    peak = recipe.lr if trial is MUON else trial.lr
    for name, parameter in model.named_parameters():
        if trial is MUON and parameter.ndim == 4:
            continue
        decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
        rate = 0.5 * peak * (recipe.bias_lr if name.endswith("bias") else 1.0)
        gradient = parameter.grad + decay * before[name]
        expected = before[name] - rate * (1 + recipe.momentum) * gradient
        torch.testing.assert_close(parameter.detach(), expected)


def test_muon_sets_the_norm_of_the_filters_before_it_moves_them(config: Config) -> None:
    model = made(config)
    optimizers.Update(model, config, replace(MUON, normalized=True)).step(0.0)
    for name, weight in weights(model).items():
        if weight.ndim == 4:
            assert weight.norm().item() == pytest.approx(len(weight) ** 0.5, rel=1e-5), name


def test_the_lookahead_holds_filters_and_all_else(config: Config) -> None:
    model = made(config)
    before = weights(model)
    update = optimizers.Update(model, config, replace(MUON, averaged=True))
    update.step(0.5)
    moved = weights(model)
    update.average(0.75)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), 0.75 * before[name] + 0.25 * moved[name])
    slow = weights(model)
    update.step(0.5)
    with update.answering():
        assert all(torch.equal(slow[name], weight) for name, weight in weights(model).items())
    assert not any(torch.equal(slow[name], weight) for name, weight in weights(model).items())


def test_rates_are_chosen_by_the_images_set_apart() -> None:
    found = {0.1: {"apart": 70.0, "test": 80.0}, 0.2: {"apart": 71.0, "test": 60.0}}
    trials = [replace(SGD, lr=lr) for lr in found]
    assert optimizers.best(trials, lambda trial: found[trial.lr]).lr == 0.2
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(10), 500))
    apart = optimizers.set_apart(labels)
    assert np.bincount(labels[apart]).tolist() == [200] * 10


def test_what_is_done_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless with another recipe, of other images, or by other code."""
    recipe, images, code = (tmp_path / name for name in ("short.yaml", "train.parquet", "code.py"))
    recipe.write_text("teacher: {epochs: 5}\ndata: {train: /x, test: /x}")
    images.write_text("images")
    trained: list[float] = []

    def train(config: Config, *given: object) -> dict[str, float]:
        trained.append(config.teacher.epochs)
        return dict.fromkeys(("apart", "test", "loss", "all_s", "optimizer_s"), float(len(trained)))

    monkeypatch.setattr(optimizers, "train", train)

    def found() -> float:
        source = optimizers.made_by(str(recipe), tmp_path)
        run = optimizers.Trials(tmp_path / "trials.jsonl", source, str(recipe), None)
        return run(MUON)["test"]

    assert [found(), found()] == [1, 1]
    recipe.write_text("teacher: {epochs: 5, label_smoothing: 0.5}\ndata: {train: /x, test: /x}")
    assert [found(), found()] == [2, 2]
    assert "lines made from something else: 1" in capsys.readouterr().err
    images.write_text("other images")
    assert [found(), found()] == [3, 3]
    code.write_text("an edit of the module")
    monkeypatch.setattr(optimizers, "__file__", str(code))
    assert [found(), found()] == [4, 4]
    assert trained == [MUON.epochs] * 4
    with open(
        tmp_path / "trials.jsonl", "a"
    ) as lines:  # as before lines said what they were made from
        lines.write(json.dumps({"trial": asdict(SGD), "found": {}}) + "\n")
    assert found() == 4
