"""Batches with sets in them, and the losses on these, of the benchmark of stems trained for sets."""

from __future__ import annotations

from argparse import Namespace
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from cnn2gnn_dist.inference.sets.related import rows_by_class
from tests.support.benchmarks import benchmark

set_stem = benchmark("set_stem")

LABELS = np.repeat(np.arange(10), 40)


def drawing() -> object:
    drawing = object.__new__(set_stem.InSets)
    drawing.of_class, drawing.rng = rows_by_class(LABELS), np.random.default_rng(0)
    return drawing


def test_a_batch_ends_with_its_sets_and_is_as_large_as_one_without() -> None:
    drawn, sizes, bursts = drawing(), set(), 0
    rows = torch.arange(1000, 1000 + set_stem.features.BATCH)
    for _ in range(60):
        members, related = drawn.draw()
        batch = set_stem.mixed(rows, members)
        assert len(batch) == len(rows)
        random = len(rows) - members.size
        assert random >= len(rows) // 2
        assert batch[:random].tolist() == rows[:random].tolist()
        assert batch[random:].tolist() == members.ravel().tolist()
        classes = np.array([len(np.unique(LABELS[of_set])) for of_set in members])
        assert related[classes == 1].all()
        sizes.add(members.shape[1])
        bursts += (classes == 1).sum()
    assert sizes == set(set_stem.SIZES)
    assert bursts > 60


def test_pairs_of_one_class_weigh_as_much_as_pairs_of_two() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(size=(3, 5, 5))
    odds = odds + odds.transpose(0, 2, 1)
    labels = np.array([[0, 0, 1, 2, 2], [3, 3, 3, 3, 3], [0, 1, 2, 3, 4]])
    pairs = [(s, i, j) for s in range(3) for i, j in combinations(range(5), 2)]
    same = [bool(labels[s, i] == labels[s, j]) for s, i, j in pairs]
    p = [1 / (1 + np.exp(-odds[at])) for at in pairs]
    weights = [1 / same.count(kind) for kind in same]
    found = set_stem.pair_loss(torch.from_numpy(odds), torch.from_numpy(labels))
    assert float(found) == pytest.approx(log_loss(same, p, sample_weight=weights))


def test_a_batch_of_bursts_has_only_pairs_of_one_class() -> None:
    found = set_stem.pair_loss(torch.zeros(2, 3, 3), torch.zeros(2, 3).long())
    assert float(found) == pytest.approx(np.log(2) / 2)


def test_each_half_of_the_calibration_images_has_half_of_each_class() -> None:
    labels = np.random.default_rng(0).permutation(LABELS)
    second = set_stem.halved(labels)
    assert np.bincount(labels[second]).tolist() == [20] * 10
    assert np.bincount(labels[~second]).tolist() == [20] * 10


def test_figures_of_seeds_are_averaged_kind_by_kind() -> None:
    def judged(gain: float) -> dict[str, object]:
        rows = [{"set": kind, "alone": 40.0, "learned": gain + at} for at, kind in enumerate("ab")]
        return {"alone": 40 + gain, "seconds": 100 * gain, "rows": rows}

    found = set_stem.average([judged(1), judged(2)])
    assert found["alone"] == 41.5
    assert found["seconds"] == 150
    assert [row["set"] for row in found["rows"]] == ["a", "b"]
    assert [row["learned"] for row in found["rows"]] == [1.5, 2.5]


class Counted:
    """A training that only counts its epochs."""

    runs: ClassVar[list[int]] = []
    steps = 1

    def __init__(self, images: object, epochs: int, seed: int) -> None:
        pass

    def run(self, epochs: int, in_sets: object = None) -> float:
        self.runs.append(epochs)
        return 0.0

    def state(self) -> dict[str, int]:
        return {}

    def resume(self, state: dict[str, int]) -> None:
        pass

    def finish(self) -> None:
        pass


def test_students_of_other_data_epochs_or_code_are_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mini-imagenet").mkdir()
    images = tmp_path / "mini-imagenet" / "train-0.parquet"
    images.write_text("images")
    columns = ("train/logits", "calibration/z", "test/z", "train/z")
    monkeypatch.setenv("CNN2GNN_DATA", str(tmp_path))
    monkeypatch.setattr(set_stem, "Training", Counted)
    monkeypatch.setattr(set_stem, "InSets", lambda *given: None)
    monkeypatch.setattr(set_stem, "computed", lambda *given: dict.fromkeys(columns, np.zeros(1)))

    def runs(objective: str, epochs: int = 8, last: int = 3) -> list[int]:
        """Epochs of the trainings that a call with these options makes."""
        Counted.runs.clear()
        set_stem.code_and_data.cache_clear()  # another call, another process
        given = Namespace(folder=tmp_path, data="mini-imagenet", epochs=epochs, last=last)
        set_stem.trained(None, given, 0, set_stem.Way(objective))
        return list(Counted.runs)

    assert runs("plain") == [5, 3]
    start = tmp_path / "mini-imagenet-0.json"
    start.write_text("fitted on the state after 5 epochs")
    assert runs("pairs") == [3]
    assert runs("pairs") == runs("plain") == []
    assert start.exists()
    assert runs("plain", last=2) == [6, 2]
    assert not start.exists()
    assert runs("pairs", last=2) == [2]
    assert runs("plain", epochs=9, last=2) == [7, 2]
    images.write_text("other images")
    assert runs("plain", epochs=9, last=2) == [7, 2]
    monkeypatch.setattr(set_stem, "__file__", str(images))  # as after an edit of the module
    assert runs("plain", epochs=9, last=2) == [7, 2]
