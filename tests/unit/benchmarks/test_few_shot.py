"""The benchmark of few images: what it keeps is of the run at hand; its rules on examples worked out by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist import ledger
from tests.support.benchmarks import benchmark

few_shot = benchmark("few_shot")
episodes = benchmark("remembering.episodes")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that were given; instead of training, a run records the preset as its digest."""
    given: list[str] = []

    def run(line: list[str], check: bool) -> None:
        given.append(line[3])
        if line[3] == "run":
            folder = tmp_path / "run" / "model"
            folder.mkdir(parents=True, exist_ok=True)
            ledger.finish(folder, ledger.Entry("key", {}, digest=line[line.index("--config") + 1]))
        else:
            (tmp_path / "model").mkdir(exist_ok=True)
            made = ledger.finished(tmp_path / "run" / "model")
            assert made is not None
            (tmp_path / "model" / "checksums.json").write_text(made.digest)

    monkeypatch.setattr(subprocess, "run", run)
    return given


def test_a_model_of_another_run_is_exported_again(
    commands: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for preset in ("one", "one", "two", "two"):
        few_shot.train(tmp_path, preset, [])
        assert (tmp_path / "model" / "checksums.json").read_text() == preset
        said = capsys.readouterr().err
        assert ("model was made from something else" in said) == (len(commands) == 5)
    assert commands == ["run", "export", "run", "run", "export", "run"]


def test_a_model_of_unknown_origin_is_exported_again(commands: list[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    few_shot.train(tmp_path, "one", [])
    assert commands == ["run", "export"]


class Doubled:
    """Answers with the numbers of the rows, times the factor of its folder."""

    def __init__(self, folder: Path, factor: int) -> None:
        self.folder, self.factor = folder, factor
        folder.mkdir(exist_ok=True)
        (folder / "checksums.json").write_text(f'{{"factor": {factor}}}')

    def batches(self, file: str, size: int) -> list[np.ndarray]:
        return list(np.array_split(np.arange(pq.ParquetFile(file).metadata.num_rows), 2))

    def outputs(self, rows: np.ndarray) -> Any:
        x_BD = self.factor * np.stack([rows, rows], 1).astype(np.float32)
        return SimpleNamespace(x=x_BD, z=x_BD, logits=x_BD + 1)


def test_features_of_another_model_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = lambda made: SimpleNamespace(  # noqa: E731
        **{name: np.concatenate([getattr(one, name) for one in made]) for name in ("x", "logits")}
    )
    monkeypatch.setattr(few_shot, "joined", joined)
    pq.write_table(pa.table({"label": [3, 1, 2]}), tmp_path / "novel.parquet")
    for factor, again in ((1, False), (1, False), (5, True)):
        images, labels = few_shot.features(tmp_path, Doubled(tmp_path / "model", factor), "novel")
        np.testing.assert_array_equal(images.x_nD[:, 0], factor * np.arange(3))
        np.testing.assert_array_equal(images.logits_nC, images.x_nD + 1)
        assert labels.tolist() == [3, 1, 2]
        assert ("novel.npz was made from something else" in capsys.readouterr().err) == again


class Points:
    """Features as an episode's rules see them."""

    def __init__(self, *points: tuple[float, float]) -> None:
        self.f = np.array(points, np.float64)

    def means(self, episode: Any) -> np.ndarray:
        return self.f[episode.support].mean(1)


def test_an_episode_has_different_images_of_different_classes() -> None:
    labels = np.repeat([4, 7, 9, 11], 6)
    seen = set()
    for number in range(40):
        episode = episodes.draw(labels, 3, 2, 4, number)
        assert episode.support.shape == (3, 2)
        assert episode.queries.shape == (3, 4)
        rows = np.concatenate([episode.support, episode.queries], 1)
        assert len(set(rows.reshape(-1).tolist())) == 18
        of_class = labels[rows]
        assert (of_class == of_class[:, :1]).all()
        assert len(set(of_class[:, 0].tolist())) == 3
        seen |= set(of_class[:, 0].tolist())
        assert episode.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        again = episodes.draw(labels, 3, 2, 4, number)
        assert np.array_equal(again.queries, episode.queries)
    assert seen == {4, 7, 9, 11}


def unit(degrees: float) -> tuple[float, float]:
    return float(np.cos(np.deg2rad(degrees))), float(np.sin(np.deg2rad(degrees)))


def test_distances_are_to_class_means_of_unit_length() -> None:
    """Shots at 0 and 60 degrees have their mean at 30: a query at 90 is 60 away, chord 1."""
    of = Points(unit(0), unit(60), unit(180), unit(180), unit(90), unit(30))
    episode = episodes.Episode(np.array([[0, 1], [2, 3]]), np.array([[4], [5]]))
    found = episodes.distances(of, episode, of.means(episode))
    chord = [[1.0, 2.0], [0.0, 2 - 2 * np.cos(np.deg2rad(150))]]
    np.testing.assert_allclose(found, chord, atol=1e-12)


def test_soft_kmeans_moves_a_mean_to_the_queries() -> None:
    """Against its formula for one round, written out with norms (Ren et al., ICLR 2018)."""
    angles = [0, 90, 20, 30, 80]
    of = Points(*map(unit, angles))
    episode = episodes.Episode(np.array([[0], [1]]), np.array([[2], [3], [4]]))
    queries, shots = of.f[2:], of.f[:2]

    def shares(means: np.ndarray) -> np.ndarray:
        means = means / np.linalg.norm(means, axis=1, keepdims=True)
        weight = np.exp(-4 * np.linalg.norm(queries[:, None] - means[None], axis=2) ** 2)
        return weight / weight.sum(1, keepdims=True)

    first = shares(shots)
    moved = (shots + first.T @ queries) / (1 + first.sum(0))[:, None]
    np.testing.assert_allclose(episodes.soft_kmeans(of, episode, 4.0, rounds=0), first, atol=1e-12)
    one = episodes.soft_kmeans(of, episode, 4.0, rounds=1)
    np.testing.assert_allclose(one, shares(moved), atol=1e-12)
    assert abs(one - first).max() > 0.01


def test_laplacian_shot_lets_near_queries_agree() -> None:
    """A query between the classes follows the queries around it; without their weight it does not."""
    of = Points(*map(unit, [0, 90, 43, 50, 55, 60, 5]))
    episode = episodes.Episode(np.array([[0], [1]]), np.array([[2], [3], [4], [5], [6]]))
    alone = episodes.laplacian_shot(of, episode, 0.0, 10.0)
    assert alone.argmax(1).tolist() == [0, 1, 1, 1, 0]
    own = -10.0 * episodes.distances(of, episode, of.means(episode))
    expected = np.exp(own) / np.exp(own).sum(1, keepdims=True)
    np.testing.assert_allclose(alone, expected, atol=1e-12)
    together = episodes.laplacian_shot(of, episode, 2.0, 10.0, near=3)
    assert together.argmax(1).tolist() == [1, 1, 1, 1, 0]
    near = [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2]]  # by angle, by hand
    one = own + 2.0 * np.stack([alone[rows].sum(0) for rows in near])
    wanted = np.exp(one) / np.exp(one).sum(1, keepdims=True)
    found = episodes.laplacian_shot(of, episode, 2.0, 10.0, near=3, rounds=1)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
