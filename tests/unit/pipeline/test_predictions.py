"""Scores compared with their definitions, scikit-learn, and loops; which images are evaluated, in which batches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

from cnn2gnn_dist import settings
from cnn2gnn_dist.data.batch_sizes import parts_of_rank
from cnn2gnn_dist.data.index import manifest as manifests
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import calibration_error
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.evaluate import as_json, table
from cnn2gnn_dist.stages.neighbours.neighbourhood import last_refresh
from cnn2gnn_dist.stages.shared import predictions
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from cnn2gnn_dist.stages.shared.predictions import Predictions
from tests.support.shards import encode_image, random_images, write_tar

IMAGES, BATCH, SEED = 23, 5, 4
CORRUPT = (2, 9, 22)
LABELS = np.arange(IMAGES) % 3


def held_out(root: Path, corrupt: tuple[int, ...] = CORRUPT) -> np.ndarray:
    """The images of a run with a manifest of held-out images, some of which are HTML pages."""
    images = random_images(IMAGES, 8, 8, seed=1)
    members = []
    for i, image in enumerate(images):
        members.append((f"i{i:02d}.cls", str(LABELS[i]).encode()))
        members.append((f"i{i:02d}.png", b"<html>404" if i in corrupt else encode_image(image)))
    tar = write_tar(root / "test-000000.tar", members)
    path = root / "manifest" / "test.arrow"
    path.parent.mkdir(parents=True)
    manifests.index([tar], progress=False).save(path)
    return images


def context(root: Path, *overrides: str) -> Context:
    config = settings.load(
        "demo",
        [
            f"run.dir={root}",
            "views.kind=none",
            "views.size=8",
            "stream.backend=local",
            f"evaluate.batch={BATCH}",
            "data.max_corrupt=0.5",
            *overrides,
        ],
    )
    ranks = Ranks.from_environment()
    folder = root / "teacher"
    folder.mkdir(exist_ok=True)
    return Context(config, ranks, RunPaths(root), folder, "", "cpu", False)


def test_the_accuracy_is_of_what_was_evaluated(tmp_path):
    held_out(tmp_path)

    def classify(images: Tensor) -> Tensor:
        assert images.flatten(1).any(1).all()
        return torch.eye(3)[torch.full((len(images),), 2)]

    sound = np.delete(LABELS, CORRUPT)
    assert (sound == 2).mean() != (sound == 0).mean()
    assert predictions.accuracy_of(context(tmp_path), classify) == pytest.approx(
        (sound == 2).mean()
    )


def test_three_of_those_left_out_are_named():
    left_out = {9: "i09: no image", 2: "i02: cut off", 5: "i05: HTML", 4: "i04: empty"}
    told = predictions.describe_left_out(left_out, 23)
    assert told == (
        "4 of 23 held-out images are corrupt and not evaluated: i02: cut off; i04: empty; i05: HTML"
    )


def nothing(images: Tensor) -> dict[str, Tensor]:
    return {"m": torch.full((len(images), 3), 1 / 3)}


def test_more_corrupt_than_the_limit_is_refused_before_anything_is_trained(tmp_path):
    held_out(tmp_path)
    strict = context(tmp_path, "data.max_corrupt=0.1")
    for refused in (
        lambda: predictions.check_held_out(strict),
        lambda: predictions.evaluate(strict, nothing, strict.paths.test_manifest),
    ):
        with pytest.raises(UserError, match="3 corrupt held-out images among 23") as caught:
            refused()
        assert "i02" in caught.value.what
        assert caught.value.where == "data.max_corrupt"
    assert not list(strict.folder.iterdir())


def test_held_out_images_are_looked_through_once(tmp_path, capsys, console):
    held_out(tmp_path)
    predictions.check_held_out(context(tmp_path))
    assert "3 of 23 held-out images are corrupt and not evaluated" in capsys.readouterr().err
    (tmp_path / "test-000000.tar").unlink()
    predictions.check_held_out(context(tmp_path))


def test_no_image_that_can_be_read_is_no_result(tmp_path):
    held_out(tmp_path, tuple(range(IMAGES)))
    lenient = context(tmp_path, "data.max_corrupt=1")
    for refused in (
        lambda: predictions.check_held_out(lenient),
        lambda: predictions.evaluate(lenient, nothing, lenient.paths.test_manifest),
    ):
        with pytest.raises(UserError, match="none of the 23 held-out images can be read") as raised:
            refused()
        assert [name in raised.value.what for name in ("i00", "i02", "i03")] == [True, True, False]


def test_answers_that_are_not_finite_are_no_result(tmp_path):
    held_out(tmp_path)

    def answer(images: Tensor) -> dict[str, Tensor]:
        return {"student": torch.full((len(images), 3), torch.nan)}

    here = context(tmp_path)
    with pytest.raises(UserError, match="20 of 20 predictions of the student are not finite"):
        predictions.evaluate(here, answer, here.paths.test_manifest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_results_are_strict_json(value):
    assert json.loads(as_json({"a": [{"b": 1.5}], "c": None})) == {"a": [{"b": 1.5}], "c": None}
    with pytest.raises(UserError, match=r"the result a\[0\]\.b is"):
        as_json({"a": [{"b": value}]})


@pytest.fixture
def found():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), [50, 30, 15, 4, 1])  # there is also a class 5, without images
    predicted = np.where(rng.random(100) < 0.7, labels, rng.integers(0, 6, 100))
    return Predictions(np.arange(100), predicted, rng.random(100).astype(np.float32), labels)


def test_scores_equal_scikit_learns(found):
    scores = found.scores(6)
    assert scores["accuracy"] == pytest.approx((found.predicted_N == found.label_N).mean())
    with pytest.warns(UserWarning, match="classes not in y_true"):
        wanted = balanced_accuracy_score(found.label_N, found.predicted_N)
    assert scores["balanced_accuracy"] == pytest.approx(wanted)


def test_calibration_error_by_hand(found):
    right = found.predicted_N == found.label_N
    total = 0.0
    for b in range(15):
        low, high = b / 15, (b + 1) / 15
        inside = (found.confidence_N >= low) & (found.confidence_N < high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - found.confidence_N[inside].mean())
    assert calibration_error(found.confidence_N, right) == pytest.approx(total, rel=1e-5)
    assert calibration_error(np.ones(10), np.ones(10, bool)) == 0.0
    assert calibration_error(np.ones(10), np.zeros(10, bool)) == 1.0
    assert calibration_error(np.array([0.5]), np.ones(1, bool)) == 0.5
    # A confidence of exactly 1 is in the last bin, from 14/15 up.
    for confidence, right, wanted in (([1.0, 0.95], [0, 1], 0.95), ([0.99, 0.9], [1, 0], 0.91)):
        found_error = calibration_error(np.array(confidence), np.array(right, bool))
        assert found_error == pytest.approx(wanted / 2)


def test_last_refresh_over_epochs():
    from cnn2gnn_dist.config import GraphConfig

    every_third = GraphConfig(start_epoch=2, refresh_epochs=3)
    found = [last_refresh(epoch, every_third) for epoch in range(10)]
    assert found == [None, None, 2, 2, 2, 5, 5, 5, 8, 8]


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (1, 4), (2, 2), (2, 5), (3, 8), (4, 4)])
def test_every_part_has_one_owner_and_every_rank_a_part(world, parts):
    owned = [parts_of_rank(rank, world, parts) for rank in range(world)]
    assert sorted(p for parts_of_one in owned for p in parts_of_one) == list(range(parts))
    assert all(owned)


def test_table_shows_every_model():
    row = {
        "accuracy": 0.5,
        "balanced_accuracy": 0.4,
        "ece": 0.1,
        "parameters": 12345,
        "flops": 2e6,
        "ms_per_image": 0.25,
    }
    models = ("teacher", "student", "self_path", "vote", "control_mlp")
    text = table(dict.fromkeys(models, row | {"ms_alone": 1.125}))
    assert text.count("0.250   1.125") == 5
    text = table(dict.fromkeys(models, row))
    assert text.count("50.00%") == 5
    assert "12,345" in text
    assert "left out" not in text
    counted = {**row, "evaluated": 1_200, "left_out": 3}
    last = table(dict.fromkeys(models, counted)).splitlines()[-1]
    old = {**row, "judged": 1_200, "left_out": 3}  # the key of earlier versions
    assert table({"student": old}).splitlines()[-1] == last
    assert last == "evaluated on 1,200 held-out images; 3 that can't be read are left out"


@pytest.mark.parametrize(
    ("said", "labels", "failed"),
    [
        ([2] * 10, [2, 2, 2, 2, 1, 1, 1, 0, 0, 0], "40.0% of .* class for all of them"),
        ([1] * 10, [2, 2, 2, 2, 1, 1, 1, 0, 0, 0], "30.0% .*most frequent class \\(40.0%\\)"),
        ([2, 2, 2, 0, 1, 0, 0, 0, 1, 1], [2, 2, 2, 2, 1, 1, 1, 0, 0, 0], None),
        ([0, 1, 0, 1], [1, 0, 1, 0], "0.0% of the held-out images are right"),
        # 80 % of each class, as after student.logit_adjust, where 90 % of the images are of one class
        ([0] * 72 + [1] * 18 + [1] * 8 + [0] * 2, [0] * 90 + [1] * 10, None),
        ([0] * 45 + [1] * 45 + [1] * 6 + [0] * 4, [0] * 90 + [1] * 10, "51.0% of"),  # guesses
        ([1] * 5, [1] * 5, None),  # a single class: always right, and nothing to learn
    ],
)
def test_answers_that_nothing_was_learned_for_are_a_failure(said, labels, failed):
    count = len(said)
    found = Predictions(
        np.arange(count), np.array(said), np.ones(count, np.float32), np.array(labels)
    )
    failure = found.failure()
    if failed is None:
        assert failure is None
    else:
        assert re.match(failed, failure)
        assert ("one class" in failure) == (len(set(said)) == 1)


@pytest.mark.parametrize(
    ("said", "labels", "uneven"),
    [
        ([0] * 62, [0] * 60 + [1] * 2, "2 of 62 held-out images not of the most frequent one"),
        ([0] * 10, [0] * 5 + [1] * 5, None),
        (
            [1] * 62,
            [0] * 60 + [1] * 2,
            None,
        ),  # wrong where most images are: the classes don't explain it
        ([0] * 60, [0] * 30 + [1, 2, 3] * 10, "30 of 60"),
        ([0] * 60, [0] * 14 + [1] * 12 + [2] * 12 + [3] * 11 + [4] * 11, None),
    ],
)
def test_uneven_classes_are_named_before_a_diverged_training(said, labels, uneven):
    count = len(said)
    found = Predictions(
        np.arange(count), np.array(said), np.ones(count, np.float32), np.array(labels)
    )
    cause = found.cause()
    assert "raining has diverged, or was far too short" in cause
    if uneven is None:
        assert cause.startswith("Its training")
    else:
        assert cause.startswith("The classes are uneven")
        assert uneven in cause
