"""Rows of the accuracy table that no stage evaluates: shuffled neighbors, and a control without a student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnn2gnn_dist import settings
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.compared_models import compared_models
from cnn2gnn_dist.stages.shared import predictions
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from cnn2gnn_dist.stages.shared.predictions import Predictions
from tests.support.benchmarks import benchmark
from tests.support.runs import results


def with_permuted_bank(run: Path, place_N: np.ndarray) -> dict[str, Predictions]:
    """Answers with features and labels of the bank exchanged; projections, which find and weight neighbors, stay."""
    config = settings.load(str(run / "config.yaml"), ["stream.backend=local"])
    context = Context(config, Ranks(), RunPaths(run), run, "", "cpu", False)
    student = next(m for m in compared_models(context, 10, False) if m.with_bank)
    assert student.with_bank is not None
    around = student.with_bank.around
    assert around.search is not None
    bank, place = around.search.bank, torch.from_numpy(place_N)
    for name in ("x_LD", "labels_L"):
        setattr(bank, name, getattr(bank, name)[place].clone())
    return predictions.evaluate(context, student.answer, context.paths.test_manifest).found


def test_every_neighbour_is_an_arbitrary_node(
    micro_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_N = np.random.default_rng(0).permutation(results(micro_run)["run"]["train_images"])
    wanted = with_permuted_bank(micro_run, place_N)  # the run's seed is 0
    seen, evaluate = [], predictions.evaluate

    def noted(*arguments: Any, **more: Any) -> Any:
        seen.append(evaluate(*arguments, **more))
        return seen[-1]

    monkeypatch.setattr(predictions, "evaluate", noted)
    accuracy_of_it = benchmark("evaluated_apart").shuffled_accuracy(micro_run)
    (found,) = seen
    for name in ("student", "vote"):
        for what in ("predicted_N", "confidence_N"):
            one, other = (getattr(these[name], what) for these in (found.found, wanted))
            np.testing.assert_array_equal(one, other)
    student, own = wanted["student"], np.load(micro_run / "evaluation" / "vote.npz")
    assert accuracy_of_it == (student.predicted_N == student.label_N).mean()
    # What neighbors say is no better than chance, one in ten: three deviations of 80 images above it.
    assert (own["predicted"] == own["labels"]).mean() > 0.4
    assert (wanted["vote"].predicted_N == student.label_N).mean() < 0.2


def test_a_control_needs_no_student(micro_run: Path, tmp_path: Path) -> None:
    for name in ("shards", "manifest", "control"):
        shutil.copytree(micro_run / name, tmp_path / name)
    shutil.copyfile(micro_run / "config.yaml", tmp_path / "config.yaml")
    found = benchmark("evaluated_apart").control_scores(tmp_path)
    assert found == {name: results(micro_run)["control_mlp"][name] for name in found}
    assert found.keys() == {"accuracy", "balanced_accuracy", "ece"}
