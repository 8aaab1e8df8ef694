"""The sets of the benchmark of rare, wrong and few labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist import settings
from tests.support import REPOSITORY
from tests.support.benchmarks import benchmark

accuracy = benchmark("accuracy")
hard_labels = benchmark("hard_labels")

LABELS = np.random.default_rng(5).permutation(np.repeat(np.arange(10), 1000))


def made(name: str) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = hard_labels.MAKERS[name](LABELS, np.random.default_rng(0))
    assert len(set(rows.tolist())) == len(rows) == len(labels)
    return rows, labels


def test_every_class_of_the_long_tail_is_rarer_down_to_a_hundredth() -> None:
    rows, labels = made("long_tail")
    assert (labels == LABELS[rows]).all()
    # 1000 x 100^(-c/9), worked out with a calculator.
    assert np.bincount(labels).tolist() == [1000, 599, 359, 215, 129, 77, 46, 28, 17, 10]


def test_two_fifths_of_the_labels_are_another_class() -> None:
    rows, labels = made("noise")
    assert rows.tolist() == list(range(10_000))
    wrong = labels != LABELS
    assert wrong.mean() == pytest.approx(0.4, abs=0.02)
    # Each of the nine others as often: 444 each, deviation 20.
    apart = np.bincount((labels - LABELS)[wrong] % 10, minlength=10)
    assert apart[0] == 0
    assert apart[1:].min() > 360
    assert apart[1:].max() < 530


def test_a_tenth_of_every_class_keeps_its_label() -> None:
    rows, labels = made("few")
    assert rows.tolist() == list(range(10_000))
    known = labels >= 0
    assert (labels[known] == LABELS[known]).all()
    assert np.bincount(labels[known]).tolist() == [100] * 10
    assert (labels[~known] == -1).all()


def test_the_few_labels_alone_are_those_of_few_and_seen_as_often() -> None:
    rows, labels = made("few_alone")
    assert rows.tolist() == np.flatnonzero(made("few")[1] >= 0).tolist()
    assert (labels == LABELS[rows]).all()
    preset = str(REPOSITORY / "benchmarks" / "recipes" / "cifar10_short.yaml")
    few, alone = (settings.load(preset, hard_labels.OPTIONS[name]) for name in ("few", "few_alone"))
    assert few.teacher == alone.teacher
    for field in ("student.epochs", "graph.start_epoch", "graph.refresh_epochs"):
        section, name = field.split(".")
        once, often = (getattr(getattr(one, section), name) for one in (few, alone))
        assert often * hard_labels.LABELLED == once


def test_the_file_has_the_images_of_its_labels_and_is_made_again_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "cifar10"
    source.mkdir()
    for number, labels in enumerate(np.array_split(LABELS[:200], 2)):
        images = [{"bytes": f"{number}-{row}".encode()} for row in range(100)]
        pq.write_table(
            pa.table({"image": images, "label": labels}), source / f"train-{number}.parquet"
        )
    hard_labels.write("long_tail", source, tmp_path / "made" / "train.parquet")
    file = tmp_path / "made" / "train.parquet"
    found = pq.read_table(file)
    rows, labels = hard_labels.long_tail(LABELS[:200], np.random.default_rng(0))
    assert found["label"].to_pylist() == labels.tolist()
    wanted = [f"{row // 100}-{row % 100}".encode() for row in rows]
    assert [one["bytes"] for one in found["image"].to_pylist()] == wanted

    before = file.stat().st_ino  # every writing is a new file
    hard_labels.write("long_tail", source, file)
    assert file.stat().st_ino == before
    monkeypatch.setattr(hard_labels, "IMBALANCE", 10)
    hard_labels.write("long_tail", source, file)
    assert file.stat().st_ino != before
    assert len(pq.read_table(file)) > len(rows)


def test_the_variants_are_ones_that_the_table_has() -> None:
    assert hard_labels.VARIANTS.keys() == hard_labels.MAKERS.keys() == hard_labels.OPTIONS.keys()
    for variants in hard_labels.VARIANTS.values():
        assert set(variants) <= set(accuracy.VARIANTS)
