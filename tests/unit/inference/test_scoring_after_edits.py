"""How new classes are scored depends on the memory's images alone, not on the edits that led to it."""

import shutil

import numpy as np
import pytest

from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.inputs import Input
from cnn2gnn_dist.inference.memory import edits, store, turns
from cnn2gnn_dist.inference.memory.view import Memory
from tests.support.models import NEAR, pictures
from tests.unit.inference.test_editing import of_new_class


def test_two_classes_at_once_or_one_after_the_other_score_the_same(calibrated, tmp_path):
    model, asked = calibrated, pictures(10, seed=8)
    first, second = list(of_new_class(3)), list(255 - of_new_class(3, seed=201))
    editing.add(model, first, "a")
    one = editing.add(model, second, "b")
    together = model.predict_proba(asked)
    editing.remove(model, one.keys)
    editing.add(model, second, "b")
    np.testing.assert_array_equal(model.predict_proba(asked), together)


def test_what_new_classes_are_scored_by_does_not_depend_on_the_order_of_edits(calibrated, tmp_path):
    """Images added to a trained class count among the old ones at once, not from the next edit on."""
    shutil.copytree(calibrated.folder, tmp_path / "other")
    other, asked = Classifier.open(tmp_path / "other", device="cpu"), pictures(10, seed=8)
    new, old = list(of_new_class(5)), list(pictures(5, seed=60))
    editing.add(calibrated, new, "framed")
    editing.add(calibrated, old, "class 0")
    editing.add(other, old, "class 0")
    editing.add(other, new, "framed")
    heads = [model.memory.new_classes[0].count_C.tolist() for model in (calibrated, other)]
    assert heads == [[14 + 5, 13, 13]] * 2
    np.testing.assert_array_equal(calibrated.predict_proba(asked), other.predict_proba(asked))


@pytest.mark.parametrize("many", [7, 110])
def test_a_memory_with_new_classes_answers_alike_whatever_edits_led_to_it(
    calibrated, tmp_path, many
):
    """Bit-identically, on CPUs: offset, learned columns and logits are of the set of images."""
    shutil.copytree(calibrated.folder, tmp_path / "other")
    other, asked = Classifier.open(tmp_path / "other", device="cpu"), pictures(30, seed=8)
    framed, pale = of_new_class(many + 3), 255 - of_new_class(5, seed=201)
    more = pictures(4, seed=60)

    def given(name, images, first=0):
        return [Input(f"{name}-{first + n}.png", one) for n, one in enumerate(images)]

    editing.add(calibrated, given("f", framed[:many]), "framed")
    editing.add(calibrated, given("p", pale), "pale")
    editing.add(calibrated, given("o", more), "class 0")
    editing.relabel(calibrated, ["img-5"], "pale")
    editing.remove(calibrated, ["img-2"])

    editing.remove(other, ["img-2"])
    editing.add(other, given("p", pale[3:], 3), "pale")
    editing.relabel(other, ["img-5"], "pale")
    editing.add(other, given("f", framed), "framed")
    editing.remove(other, [f"f-{many + n}.png" for n in range(3)])
    editing.add(other, given("o", more), "class 0")
    editing.compact(other)
    editing.add(other, given("p", pale[:3]), "pale")

    heads = [model.memory.version.heads for model in (calibrated, other)]
    assert heads[0] == heads[1]
    assert calibrated.memory.new_classes[1].is_learned("framed") == (many >= 100)
    assert other.classes_[3:] == ["pale", "framed"]
    columns = [other.classes_.index(name) for name in calibrated.classes_]
    np.testing.assert_array_equal(
        calibrated.predict_proba(asked), other.predict_proba(asked)[:, columns]
    )


def test_logits_of_rows_are_those_of_images_asked_without_them(calibrated):
    """Up to float16 where no neighbor gives them a weight; elsewhere that weight is divided among the others."""
    memory, alone = calibrated.memory, 0
    for row in range(40):
        edit = edits.Edit(memory.root)
        rows = np.array([row])
        near = edit.nearest_others(rows, calibrated.spec.graph.fanout).astype(np.int64)
        found = calibrated.network.row_logits(edit, rows, near)
        without = edits.Edit(memory.root)
        without.remove(rows)
        image = pictures(40)[rows]
        wanted = calibrated.network(image, _view(without)).logits
        if not (edit.candidates(near[0])[:, : NEAR + 1] == row).any():
            alone += 1
            np.testing.assert_allclose(found, wanted, atol=2e-3)
        np.testing.assert_allclose(found, wanted, atol=0.2)
    assert alone > 2


def _view(edit):
    """The memory after an edit that is not committed, for the network."""
    with turns.editing(edit.root):
        version = edit.commit("test")
        memory = Memory.open(edit.root)
        store.set_head(edit.root, version.parent)
    return memory
