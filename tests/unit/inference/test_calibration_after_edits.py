"""What is said of calibration images holds for the memory as it was edited, not as it was exported."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from scipy import special

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.scoring import HeldOut
from tests.support.models import SLOTS, pictures, write_model
from tests.unit.inference.test_editing import of_new_class

APART = pictures(60, seed=3)
"""The images that ``calibrate`` sets apart."""


def labels(model):
    with np.load(model.folder / artefact.CALIBRATION) as kept:
        return kept["label"]


def logits_now(model):
    """Of the images themselves, asked."""
    return model.network(APART, model.memory).logits


def accuracy(model):
    return 100 * (model.predict_proba(APART).argmax(1) == labels(model)).mean()


def relabelled(model):
    """All images of class 0 as class 1, except for one: the others get other neighbors' labels."""
    keys = [f"img-{n}" for n in range(3, 40, 3)]
    editing.relabel(model, keys, "class 1")


def removed(model):
    editing.remove(model, [f"img-{n}" for n in range(0, 40, 3)])


def added(model):
    editing.add(model, list(pictures(30, seed=90)), "class 2")


EDITS = pytest.mark.parametrize("edit", [relabelled, removed, added])


@EDITS
def test_images_set_apart_are_answered_as_they_would_be_if_asked(calibrated, edit):
    held_out = HeldOut.read(calibrated.folder)
    for change in (lambda _: None, edit):
        change(calibrated)
        memory = calibrated.memory
        found = held_out.logits_with(calibrated.network, memory, memory.nearest)
        np.testing.assert_allclose(found, logits_now(calibrated), atol=1e-5)
    assert np.abs(found - held_out.images.logits_nC).max() > 0.05


@EDITS
def test_predicted_accuracies_are_those_of_the_edited_memory(calibrated, edit):
    edit(calibrated)
    before = accuracy(calibrated)
    done = editing.add(calibrated, list(of_new_class(6)), "framed", old_loss=10.0, dry_run=True)
    assert done.old_before == pytest.approx(before)
    editing.add(calibrated, list(of_new_class(6)), "framed", old_loss=10.0)
    chosen = next(trade for trade in done.trades if trade.old_loss == 10.0)
    assert chosen.old == pytest.approx(accuracy(calibrated))
    assert chosen.old >= before - 10.0 - 1e-9


@pytest.mark.parametrize(("many", "within"), [(12, True), (60, False)])
def test_new_images_among_the_neighbors_of_old_ones_count_as_a_loss(
    calibrated, many, within, caplog
):
    """They change what the head answers, before any offset."""
    model, before = calibrated, accuracy(calibrated)
    done = editing.add(model, list(255 - APART[:many]), "pale", old_loss=20.0)
    alone = 100 * (logits_now(model).argmax(1) == labels(model)).mean()
    assert alone < before - 5
    assert done.old_before == pytest.approx(before)
    chosen = next(trade for trade in done.trades if trade.old_loss == 20.0)
    assert chosen.old == pytest.approx(accuracy(model))
    assert chosen.old == pytest.approx(before - 20.0 if within else alone)
    assert ("more than the 20 allowed" in caplog.text) == (not within)


@EDITS
def test_sets_have_their_coverage_after_an_edit(calibrated, edit):
    edit(calibrated)
    model, label = calibrated, labels(calibrated)
    p = special.softmax(logits_now(model) / model.scoring.calibration.temperature, axis=1)
    for coverage, rank in ((0.5, 31), (0.8, 49), (0.95, 58)):  # ceil(61 * coverage)
        limit = np.sort(1 - p[np.arange(60), label])[rank - 1]
        found = model.predict(APART, coverage=coverage)
        sets = np.array([[name in a.scores["set"] for name in model.classes_] for a in found])
        unclear = np.abs(1 - p - limit) < 1e-5
        np.testing.assert_array_equal(sets[~unclear], (1 - p <= limit)[~unclear])
        assert sets[np.arange(60), label].sum() >= rank - 1
    reader = Classifier.open(model.folder, device="cpu")
    again = reader.predict(APART[:5], coverage=0.8)
    assert [a.scores for a in again] == [a.scores for a in model.predict(APART[:5], coverage=0.8)]
    editing.undo(model)
    size_N = np.array([len(a.scores["set"]) for a in model.predict(APART, coverage=0.8)])
    # An image set apart is the limit itself: on which side it is depends on rounding, so on the number of threads.
    exported, p = model.scoring.calibration.sets, model.predict_proba(APART)
    assert (exported.sets(p - 1e-6, 0.8).sum(1) <= size_N).all()
    assert (exported.sets(p + 1e-6, 0.8).sum(1) >= size_N).all()


def test_coverage_with_fewer_images_set_apart(calibrated, caplog):
    editing.forget(calibrated, [f"apart-{n}" for n in range(50)])
    with pytest.raises(UserError, match="needs at least 19 calibration images, and there are 10"):
        calibrated.predict(APART[:2], coverage=0.95)
    assert calibrated.predict(APART[0], coverage=0.8).scores["set"]
    editing.forget(calibrated, [f"apart-{n}" for n in range(50, 60)])
    calibrated.predict(APART[:2], coverage=0.95)
    assert "no image set apart is left" in caplog.text


def test_coverage_is_never_of_another_models_images(calibrated, tmp_path):
    removed(calibrated)
    write_model(tmp_path / "other", seed=5)
    shutil.rmtree(calibrated.folder)
    (tmp_path / "other").rename(calibrated.folder)
    calibrated.predict(APART[:2])
    with pytest.raises(UserError, match="another model has taken the place"):
        calibrated.predict(APART[:2], coverage=0.8)


def test_a_nearer_neighbor_is_not_compared_with_distances_of_farther_ones(calibrated):
    keys = [f"img-{n}" for n in range(40)]
    editing.remove(calibrated, keys[SLOTS:])
    assert set(calibrated.predict(APART[0]).scores["unusual"]) == {"softmax", "distance", "vote"}
    editing.remove(calibrated, keys[:1])
    assert set(calibrated.predict(APART[0]).scores["unusual"]) == {"softmax", "vote"}


def test_the_neighbor_that_is_compared_is_the_one_of_the_export(calibrated):
    """A model of so few images that they had fewer neighbors than there may be."""
    path = calibrated.folder / artefact.CALIBRATION
    with np.load(path) as kept:
        columns = dict(kept)
    np.savez(path, **columns | {"near_distance": columns["near_distance"][:, :3]})
    artefact.write_checksums(calibrated.folder)
    model = Classifier.open(calibrated.folder, device="cpu")
    third = model.network(APART[:9], model.memory).distances[:, 2]
    known = model.scoring.calibration.distances_n
    wanted = [(known <= one).sum() / (len(known) + 1) for one in third]
    found = [a.scores["unusual"]["distance"] for a in model.predict(APART[:9])]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
