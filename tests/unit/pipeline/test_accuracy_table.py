"""The harness of the accuracy table: cells of one config only, none lost."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import REPOSITORY


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    """The benchmark as a module."""
    path = REPOSITORY / "benchmarks" / "accuracy.py"
    spec = importlib.util.spec_from_file_location("accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells_of_a_trial_do_not_pass_for_those_of_the_preset(
    accuracy: ModuleType, tmp_path: Path
) -> None:
    trial = ["teacher.epochs=2", "data.limit=100"]
    accuracy.claim(tmp_path / "cells", "demo", trial)
    accuracy.claim(tmp_path / "cells", "demo", trial)
    with pytest.raises(SystemExit, match=r"another config: .*teacher\.epochs: 2 -> "):
        accuracy.claim(tmp_path / "cells", "demo", [])


def test_further_variants_leave_the_known_cells(accuracy: ModuleType) -> None:
    known = [
        {"row": "teacher", "seed": 0, "accuracy": 0.1},
        {"row": "batch", "seed": 0, "accuracy": 0.2},
        {"row": "teacher", "seed": 1, "accuracy": 0.3},
    ]
    made = [{"row": "teacher", "seed": 0, "accuracy": 0.4}]
    assert accuracy.merged(known, made) == [*known[1:], *made]
