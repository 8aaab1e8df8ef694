"""Versions of the memory: loaded next to the current one, then swapped; an answer is from one version."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist.commands.model import export
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.serving.batching import Batcher
from cnn2gnn_dist.serving.live import LiveModel
from tests.support.models import pictures, write_model


@pytest.fixture
def model(tmp_path: Path) -> Classifier:
    return Classifier.open(write_model(tmp_path / "model"), device="cpu")


def test_an_edit_leaves_the_model_that_answers_alone(model: Classifier):
    live = LiveModel(model)
    before = live.current
    live.edit(lambda beside: editing.remove(beside, ["img-1"]))
    assert (live.version, len(live.current.memory)) == (1, 39)
    assert (before.memory.version.number, len(before.memory)) == (0, 40)


def test_a_refused_edit_keeps_the_version(model: Classifier):
    live = LiveModel(model)
    with pytest.raises(UserError, match="not in the memory"):
        live.edit(lambda beside: editing.remove(beside, ["img-1", "none"]))
    assert live.version == store.head(model.memory.root) == 0


def test_edits_of_other_processes_are_followed(model: Classifier):
    live = LiveModel(model)
    other = Classifier.open(model.folder, device="cpu")
    assert not live.follow()
    editing.remove(other, ["img-1"])
    assert live.version == 0
    assert live.follow()
    assert live.version == 1
    editing.undo(other)
    assert live.follow()
    assert live.version == 0


def test_a_damaged_version_is_not_swapped_in(model: Classifier):
    live = LiveModel(model)
    other = Classifier.open(model.folder, device="cpu")
    editing.remove(other, ["img-1"])
    shutil.rmtree(store.version_folder(model.memory.root, 1))
    with pytest.raises(UserError, match="damaged"):
        live.follow()
    assert live.version == 0
    blank = [Pixels("", pictures(1)[0])]
    assert live.current.answers(blank, live.current.memory, top=1, neighbours=1)


def test_any_version_can_be_used(model: Classifier):
    live = LiveModel(model)
    for key in ("img-1", "img-2"):
        live.edit(lambda beside, key=key: editing.remove(beside, [key]))
    for number in (1, 0, 2, 2):
        live.use(number)
        assert live.version == number
    with pytest.raises(UserError):
        live.use(9)
    assert live.version == 2


def test_a_pinned_version_is_neither_followed_nor_edited_by_what_had_begun_before(
    model: Classifier,
):
    """Another thread may already wait for its turn when the version is pinned."""
    live = LiveModel(model)
    editing.remove(Classifier.open(model.folder, device="cpu"), ["img-1"])
    found: list[object] = []

    def edit() -> None:
        with pytest.raises(UserError, match="answers from one version"):
            live.edit(lambda beside: editing.remove(beside, ["img-2"]))
        found.append("refused")

    with live._lock:  # as ``use`` has it while it loads
        late = [
            threading.Thread(target=lambda: found.append(live.follow())),
            threading.Thread(target=edit),
        ]
        for thread in late:
            thread.start()
        live.pinned = True
    for thread in late:
        thread.join()
    assert sorted(map(str, found)) == ["False", "refused"]
    assert (live.version, store.head(model.memory.root)) == (0, 1)
    live.pinned = False
    assert live.follow()
    assert live.version == 1


def test_no_version_is_swapped_in_while_the_one_being_served_is_compared_with_the_disk(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
):
    """Its model and its mark are two variables: of two versions they would seem to be another memory."""
    live, held = LiveModel(model), []
    compare = LiveModel._check_version

    def compared(self: LiveModel) -> None:
        held.append(self._lock.locked())
        compare(self)

    monkeypatch.setattr(LiveModel, "_check_version", compared)
    live.edit(lambda beside: editing.remove(beside, ["img-1"]))
    live.use(0)
    live.follow()
    assert held == [True, True, True]


def test_answers_during_swaps_are_each_of_the_version_they_name(model: Classifier):
    seen: list[int | None] = []
    live = LiveModel(model, lambda new: seen.append(new.memory.version.number))
    batcher = Batcher(lambda: live.current, 10_000)
    images = [Pixels("", one) for one in pictures(2, seed=5)]
    nearest = model.predict(list(pictures(1, seed=5)))[0].neighbours[0].key
    expected, futures, stop = {}, [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            made = batcher.submit(images, top=3, neighbours=5)
            futures.append(made)
            made.result(60)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    for _ in range(4):
        live.edit(lambda beside: editing.remove(beside, [nearest]))
        live.edit(editing.undo)
    stop.set()
    for thread in asking:
        thread.join()
    batcher.close()
    for number in set(seen):
        live.use(number)
        expected[number] = live.current.answers(images, live.current.memory, top=3, neighbours=5)
    assert seen == [0, 1, 0, 2, 0, 3, 0, 4, 0, *seen[9:]]
    for future in futures:
        made = future.result(0)
        assert made.answers == expected[made.version]
    assert expected[0] != expected[1]


def test_another_memory_with_the_same_numbers_is_neither_followed_nor_edited(
    model: Classifier, tmp_path: Path
):
    """As an exported copy of this model that was edited otherwise: config and weights are the same."""
    other = Classifier.open(shutil.copytree(model.folder, tmp_path / "other"), device="cpu")
    live, asked = LiveModel(model), pictures(5, seed=9)
    live.edit(lambda beside: editing.remove(beside, ["img-1"]))
    editing.remove(other, ["img-2"])
    answers = live.current.predict_proba(asked)
    assert export.command(other.folder, model.folder, force=True) == 0
    assert store.head(model.memory.root) == live.version == 1
    for change in (
        live.follow,
        lambda: live.use(1),
        lambda: live.use(0),
        lambda: live.edit(lambda beside: editing.remove(beside, ["img-3"])),
    ):
        with pytest.raises(UserError, match="another model"):
            change()
    np.testing.assert_array_equal(live.current.predict_proba(asked), answers)
    assert len(Classifier.open(model.folder, device="cpu").memory) == 39
    assert LiveModel(Classifier.open(model.folder, device="cpu")).version == 1


def test_another_memory_that_has_not_come_to_the_version_being_served_is_not_followed(
    model: Classifier, tmp_path: Path
):
    """As a copy from before the edits: the images that were removed since would answer again."""
    other = shutil.copytree(model.folder, tmp_path / "other")
    live, asked = LiveModel(model), pictures(5, seed=9)
    for key in ("img-1", "img-2"):
        live.edit(lambda beside, key=key: editing.remove(beside, [key]))
    answers = live.current.predict_proba(asked)
    assert export.command(other, model.folder, force=True) == 0
    assert store.numbers(model.memory.root) == [0]
    for change in (
        live.follow,
        lambda: live.use(0),
        lambda: live.edit(lambda beside: editing.remove(beside, ["img-3"])),
    ):
        with pytest.raises(UserError, match=r"another model .* no version 2 yet"):
            change()
    assert (live.version, len(live.current.memory)) == (2, 38)
    np.testing.assert_array_equal(live.current.predict_proba(asked), answers)
    assert store.numbers(model.memory.root) == [0]


def test_another_memory_that_was_compacted_is_not_taken_for_this_one(
    model: Classifier, tmp_path: Path
):
    """It has no version with the number of the one being served, and a higher one."""
    other = Classifier.open(shutil.copytree(model.folder, tmp_path / "other"), device="cpu")
    live, asked = LiveModel(model), pictures(5, seed=9)
    live.edit(lambda beside: editing.remove(beside, ["img-1"]))
    answers = live.current.predict_proba(asked)
    editing.forget(other, ["img-2"])
    editing.remove(other, ["img-4"])
    assert export.command(other.folder, model.folder, force=True) == 0
    assert store.numbers(model.memory.root) == [2, 3]
    for change in (
        live.follow,
        lambda: live.use(3),
        lambda: live.edit(lambda beside: editing.remove(beside, ["img-3"])),
    ):
        with pytest.raises(
            UserError, match=r"another model .* never was the version 1 being served"
        ):
            change()
    assert (live.version, len(live.current.memory)) == (1, 39)
    np.testing.assert_array_equal(live.current.predict_proba(asked), answers)
    assert store.head(model.memory.root) == 3


def test_a_copy_of_the_memory_in_its_place_is_the_same_one(model: Classifier, tmp_path: Path):
    live = LiveModel(model)
    live.edit(lambda beside: editing.remove(beside, ["img-1"]))
    copied = shutil.copytree(model.folder, tmp_path / "copy")
    shutil.rmtree(model.folder)
    copied.rename(model.folder)
    assert not live.follow()
    live.edit(lambda beside: editing.remove(beside, ["img-2"]))
    assert (live.version, len(live.current.memory)) == (2, 38)


def test_a_compacted_memory_is_still_followed_and_edited(model: Classifier):
    """The version being served is no longer on disk then."""
    live, other = LiveModel(model), Classifier.open(model.folder, device="cpu")
    for change in (lambda: editing.remove(other, ["img-1"]), lambda: editing.compact(other)):
        change()
    assert store.numbers(model.memory.root) == [2]
    live.edit(lambda beside: editing.remove(beside, ["img-2"]))
    assert (live.version, len(live.current.memory)) == (3, 38)
    editing.compact(Classifier.open(model.folder, device="cpu"))
    assert live.follow()
    assert live.version == 4


@pytest.mark.parametrize("marked", [True, False])
def test_a_memory_that_was_compacted_more_than_once_is_still_followed(
    model: Classifier, monkeypatch: pytest.MonkeyPatch, marked: bool
):
    """Also from a version that was undone; ``marked``: an earlier package left no marks of what it deleted."""
    if not marked:
        monkeypatch.setattr(store, "marks", lambda *_: None)
    live, other = LiveModel(model), Classifier.open(model.folder, device="cpu")
    editing.remove(other, ["img-1"])
    assert live.follow()
    editing.undo(other)
    editing.remove(other, ["img-2"])
    editing.compact(other)
    editing.forget(other, ["img-3"])
    editing.remove(other, ["img-4"])
    assert store.numbers(model.memory.root) == [5, 6]
    assert live.follow()
    assert (live.version, len(live.current.memory)) == (6, 37)


def test_another_model_in_the_same_folder_is_neither_followed_nor_edited(
    model: Classifier, tmp_path: Path
):
    """A memory belongs to one network's features: the old network would search rows of the new export."""
    live, asked = LiveModel(model), pictures(5, seed=9)
    live.edit(lambda beside: editing.remove(beside, ["img-1"]))
    answers = live.current.predict_proba(asked)
    replaced = write_model(tmp_path / "other", seed=5)  # other weights, version 0 of its memory
    shutil.rmtree(model.folder)
    shutil.copytree(replaced, model.folder)
    for change in (
        live.follow,
        lambda: live.use(0),
        lambda: live.edit(
            lambda beside: editing.add(beside, list(pictures(2, seed=50)), "class 0")
        ),
        lambda: live.edit(lambda beside: editing.forget(beside, ["img-2"])),
    ):
        with pytest.raises(UserError, match="another model"):
            change()
    np.testing.assert_array_equal(live.current.predict_proba(asked), answers)
    assert len(Classifier.open(model.folder, device="cpu").memory) == 40
