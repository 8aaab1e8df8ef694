"""What benchmarks keep for their next run is used again only if it would be made in the same way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.benchmarks import benchmark

kept_files = benchmark("kept_files")
features = benchmark("remembering.features")


def test_what_was_cut_is_made_again(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt), kept_files.made_from("a", target) as missing:  # noqa: PT012
        assert missing
        target.write_text("half")
        raise KeyboardInterrupt
    for source, expected in (("a", True), ("a", False), ("b", True), ("b", False)):
        with kept_files.made_from(source, target) as missing:
            assert missing == expected


def test_a_digest_is_of_settings_names_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("b")
    first = kept_files.digest("cifar10", 5, files=[one, two])
    assert kept_files.digest("cifar10", 5, files=[two, one]) == first
    others = [
        kept_files.digest("cifar10", 6, files=[one, two]),
        kept_files.digest("cifar10", 5, files=[one]),
        kept_files.digest("cifar10", 5),
    ]
    one.write_text("c")
    others.append(kept_files.digest("cifar10", 5, files=[one, two]))
    one.write_text("a")
    others.append(kept_files.digest("cifar10", 5, files=[one.rename(tmp_path / "renamed"), two]))
    assert len({first, *others}) == 6


def test_a_line_that_a_kill_cut_off_costs_no_other(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    for number in range(2):
        kept_files.add_line("a", file, {"trial": number})
    file.write_bytes(file.read_bytes()[:-9])
    assert [line["trial"] for line in kept_files.lines_made_from("a", file)] == [0]
    kept_files.add_line("a", file, {"trial": 1})
    assert [line["trial"] for line in kept_files.lines_made_from("a", file)] == [0, 1]
    assert kept_files.lines_made_from("b", file) == []


def test_features_are_computed_again_for_other_data_or_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cifar10", "mini-imagenet"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-0.parquet").write_text(name)
    read: list[str] = []
    monkeypatch.setattr(features, "cifar10", lambda data, new: read.append("-".join(new)))
    monkeypatch.setattr(features, "mini_imagenet", lambda data: read.append("mini"))
    monkeypatch.setattr(features, "train", lambda images, epochs: None)
    monkeypatch.setattr(features, "features", lambda *made: {"number": np.array(len(read))})
    file = tmp_path / "kept" / "file.npz"

    def loaded(which: str) -> tuple[int, int]:
        return int(features.load(file, tmp_path, which)["number"]), len(read)

    assert [loaded("cifar10:cat,ship") for _ in range(2)] == [(1, 1)] * 2
    assert [loaded("cifar10:cat,dog") for _ in range(2)] == [(2, 2)] * 2
    (tmp_path / "mini-imagenet" / "train-0.parquet").write_text("other images")
    assert [loaded("cifar10:cat,dog") for _ in range(2)] == [(3, 3)] * 2
    with monkeypatch.context() as changed:  # as after an edit of the module
        changed.setattr(features, "__file__", str(tmp_path / "cifar10" / "train-0.parquet"))
        assert loaded("cifar10:cat,dog") == (4, 4)
    assert read == ["cat-ship", *["cat-dog"] * 3]
