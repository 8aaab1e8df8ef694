"""The benchmark of short trainings: epochs that fit in a number of minutes."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from cnn2gnn_dist import settings
from tests.support import REPOSITORY

TIMES = {"teacher": 720.0, "targets": 20.0, "student": 800.0, "graph": 40.0, "model": 30.0}


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("minutes")


def test_epochs_fill_the_budget_and_the_recipe_keeps_its_proportions(minutes: ModuleType) -> None:
    config = settings.load("cifar10", [])
    changed = minutes.shortened(config, TIMES, (60 + 1520 / 4) / 60)  # a quarter of both trainings
    made = settings.load("cifar10", changed)
    assert (made.teacher.epochs, made.student.epochs) == (4, 10)
    assert made.graph.start_epoch == 8  # 7.5: three quarters of the student's epochs, as before
    assert not made.student.control
    longer = settings.load("cifar10", minutes.shortened(config, TIMES, (60 + 2 * 1520) / 60))
    assert (longer.teacher.epochs, longer.student.epochs, longer.graph.start_epoch) == (32, 80, 60)
    with pytest.raises(ValueError, match=r"already take 1\.0 minutes"):
        minutes.shortened(config, TIMES, 1)


def test_the_teacher_alone_has_the_whole_budget(minutes: ModuleType) -> None:
    config = settings.load("cifar10", [])
    made = settings.load("cifar10", minutes.teacher_alone(config, TIMES, 6))
    assert made.teacher.epochs == 8
    almost = settings.load("cifar10", minutes.teacher_alone(config, TIMES, 5.9))
    assert almost.teacher.epochs == 7  # never more than fit
    assert (made.student.epochs, made.graph.scope) == (1, "batch")
