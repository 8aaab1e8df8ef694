"""Parts of a model that have their own learning rate."""

from __future__ import annotations

import pytest

from cnn2gnn_dist import settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.stages.shared.learning_rates import rates_of
from cnn2gnn_dist.stages.shared.networks import Teacher, build_student


def config(*overrides: str) -> Config:
    return settings.load("demo", list(overrides))


def test_by_default_there_are_none() -> None:
    plain = config()
    assert rates_of(Teacher(plain, 10), plain.teacher) == {}
    assert rates_of(build_student(plain, 10, "dataset"), plain.student) == {}


def test_biases_of_norms_and_the_classifier_of_a_teacher() -> None:
    own = config("teacher.bias_lr=64", "teacher.head_lr=0.5")
    found = rates_of(Teacher(own, 10), own.teacher)
    assert {name for name, rate in found.items() if rate == 0.5} == {"cnn.fc.weight", "cnn.fc.bias"}
    biases = {name for name, rate in found.items() if rate == 64}
    assert "cnn.bn1.bias" in biases
    assert all(name.endswith(".bias") for name in biases)
    assert len(biases) + 2 == len(found)


@pytest.mark.parametrize("scope", ["none", "batch", "dataset"])
def test_the_stem_of_student_and_control(scope: str) -> None:
    own = config("student.bias_lr=64", "student.stem_lr=0.25")
    student = build_student(own, 10, scope)  # type: ignore[arg-type]
    found = rates_of(student, own.student)
    stem = {f"stem.{name}" for name, _ in student.stem.named_parameters()}
    assert {name for name, rate in found.items() if rate in (0.25, 16)} == stem
    assert {rate for name, rate in found.items() if name in stem} == {0.25, 16.0}


@pytest.mark.parametrize(("scope", "gates"), [("none", 0), ("batch", 2), ("dataset", 2)])
def test_the_gates_of_the_neighbours(scope: str, gates: int) -> None:
    own = config("graph.gate_lr=8")
    student = build_student(own, 10, scope)  # type: ignore[arg-type]
    found = rates_of(student, own.student, own.graph.gate_lr)
    assert found == dict.fromkeys(["gnn.gate1", "gnn.gate2"][:gates], 8.0)
