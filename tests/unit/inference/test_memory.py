"""Edits of a memory: the result equals a memory built from the rows that are left."""

import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.inputs import Input
from cnn2gnn_dist.inference.memory import edits, rewiring, store, turns
from cnn2gnn_dist.inference.memory.rewiring import rewired
from cnn2gnn_dist.inference.memory.view import Memory
from tests.support.models import config, pictures, rows_of, table_of


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def dense(z: np.ndarray, live: np.ndarray, width: int) -> np.ndarray:
    """The table, by sorting all distances."""
    distance = np.square(z[:, None].astype(np.float64) - z).sum(-1)
    distance[:, ~live] = np.inf
    np.fill_diagonal(distance, np.inf)
    table = np.argsort(distance, axis=1, kind="stable")[:, :width]
    near = np.take_along_axis(distance, table, 1)
    table = np.where(np.isfinite(near), table, -1)
    return np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=-1)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 30),
    added=st.integers(0, 8),
    gone=st.sets(st.integers(0, 37), max_size=25),
    seed=st.integers(0, 99),
)
def test_the_table_of_an_edited_memory_is_the_one_built_from_its_rows(count, added, gone, seed):
    z = unit(count + added, 4, seed)
    live = np.ones(count + added, bool)
    live[[row for row in gone if row < count + added]] = False
    width = 5
    base = table_of(z[:count], width)
    changed = rewired(base, z, live)
    table = np.concatenate([base, np.full((added, width), -2, np.int32)])
    table[changed.ids_K] = changed.rows_KM
    np.testing.assert_array_equal(table[live], dense(z, live, width)[live])


@pytest.fixture
def asked():
    return pictures(23, seed=77)


def added_rows(model, count=4, label=0, seed=50):
    rows = rows_of(
        model.network,
        pictures(count, seed=seed),
        np.full(count, label),
        [f"new-{i}" for i in range(count)],
    )
    return rows


def edit(model, change, action="edit"):
    with turns.editing(model.memory.root):
        one = edits.Edit(model.memory.root)
        change(one)
        version = one.commit(action)
    model.reload()
    return version


def test_adding_and_removing_again_gives_the_same_bits(model, asked):
    before = model.predict_proba(asked)
    edit(model, lambda one: one.add(added_rows(model)))
    assert (model.predict_proba(asked) != before).any()
    edit(model, lambda one: one.remove(one.rows_of([f"new-{i}" for i in range(4)])))
    np.testing.assert_array_equal(model.predict_proba(asked), before)


def test_an_edited_memory_answers_as_one_built_from_its_rows(model, asked, tmp_path):
    gone = [f"img-{i}" for i in range(0, 40, 3)]
    edit(model, lambda one: one.add(added_rows(model, label=1)))
    edit(model, lambda one: one.remove(one.rows_of(gone)))
    edit(model, lambda one: one.relabel(one.rows_of(["img-1", "new-2"]), 2))

    kept = [i for i in range(40) if i % 3]
    images = np.concatenate([pictures(40)[kept], pictures(4, seed=50)])
    labels = np.array([i % 3 for i in kept] + [1] * 4)
    labels[kept.index(1)] = labels[len(kept) + 2] = 2
    keys = [f"img-{i}" for i in kept] + [f"new-{i}" for i in range(4)]
    edits.create(
        tmp_path / "built",
        rows_of(model.network, images, labels, keys),
        config().label_names,
        "built",
        np.empty(0, np.int64),
    )
    built = Memory.open(tmp_path / "built")
    ours, theirs = model.network(asked, model.memory), model.network(asked, built)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-6)
    assert [model.memory.keys(row) for row in ours.rows] == [built.keys(r) for r in theirs.rows]


def test_removed_rows_leave_the_second_hop_too(model, asked):
    """Also a node to which no image attaches, but over which the images' neighbors average."""
    out = model.network(asked[:1], model.memory)
    first = out.rows[0][out.rows[0] >= 0]
    second = np.setdiff1d(model.memory.candidates(first), np.append(first, -1))
    before = model.predict_proba(asked[:1])
    edit(model, lambda one: one.remove(second))
    after = model.network(asked[:1], model.memory)
    np.testing.assert_array_equal(after.rows[0], out.rows[0])
    assert (model.predict_proba(asked[:1]) != before).any()


def test_compacting_changes_no_answer_and_leaves_one_segment(model, asked):
    edit(model, lambda one: one.add(added_rows(model)))
    edit(model, lambda one: one.remove(np.arange(0, 30, 2)))
    before, keys = model.predict_proba(asked), model.memory.keys(model.memory.live_ids)
    edits.compact(model.memory.root)
    model.reload()
    np.testing.assert_array_equal(model.predict_proba(asked), before)
    assert model.memory.keys(model.memory.live_ids) == keys
    assert len(list((model.memory.root / "segments").iterdir())) == 1
    assert len(list((model.memory.root / "versions").iterdir())) == 1
    with pytest.raises(UserError, match="nothing to undo"):
        edits.undo(model.memory.root)


def test_undo_goes_back_one_version_and_an_edit_after_it_starts_from_there(model, asked):
    before = model.predict_proba(asked)
    edit(model, lambda one: one.remove(np.arange(10)), "remove 10")
    edits.undo(model.memory.root)
    model.reload()
    np.testing.assert_array_equal(model.predict_proba(asked), before)
    edit(model, lambda one: one.remove(np.arange(3)), "remove 3")
    assert [v.action for v in edits.history(model.memory.root)] == ["remove 3", "test"]
    assert len(model.memory) == 37


def test_a_reader_keeps_keys_and_pictures_while_its_version_is_compacted(model, asked):
    reader = Classifier.open(model.folder, device="cpu")  # has not read any key yet
    expected = [a.as_dict() for a in model.predict(asked)]
    picture = model.memory.thumbnail(3)
    editing.remove(model, ["img-1"])
    editing.compact(model)
    assert [a.as_dict() for a in reader.predict(asked)] == expected
    assert reader.memory.thumbnail(3) == picture


def test_a_memory_compacted_when_it_was_empty_is_filled_again(model, asked):
    editing.remove(model, [f"img-{n}" for n in range(40)])
    assert {a.path for a in model.predict(asked)} == {"network"}
    editing.compact(model)
    done = editing.add(model, list(pictures(5)), "class 0")
    answers = model.predict(asked)
    assert {a.path for a in answers} == {"graph"}
    assert {n.key for a in answers for n in a.neighbours} <= set(done.keys)


def test_one_image_under_two_names_is_refused(model):
    image = pictures(1, seed=9)[0]
    with pytest.raises(UserError, match=r"a\.jpg and b\.jpg are the same image"):
        editing.add(model, [Input("a.jpg", image), Input("b.jpg", image)], "class 0")
    assert store.head(model.memory.root) == 0


@pytest.mark.parametrize(
    ("given", "name"),
    [(" class 1 ", "class 1"), ("Caf\u0065\u0301", "Caf\u00e9"), ("A/b <i>", "A/b <i>")],
)
def test_spaces_and_encodings_make_no_other_class(model, given, name):
    edit = edits.Edit(model.memory.root)
    place = edit.class_index(given, new=True)
    assert edit.classes[place].name == name
    assert edit.class_index(given, new=False) == edit.class_index(name, new=True) == place


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "\udce9", "x" * 201])
def test_class_names_that_cannot_be_printed_are_refused(model, name):
    with pytest.raises(UserError, match="too long for the name of a class"):
        edits.Edit(model.memory.root).class_index(name, new=True)


def test_log_counts_an_image_once(model):
    assert editing.remove(model, ["img-1", "img-1"]).action == "remove 1 image"


@pytest.mark.parametrize("stop_at", range(12))
def test_a_killed_edit_leaves_the_version_before(model, asked, stop_at, monkeypatch):
    """Stop at every replacement of a name on disk, as a kill would."""
    before, root = model.predict_proba(asked), model.memory.root
    rows = added_rows(model)
    calls = iter(range(100))

    def replace(old, new, real=store.os.replace):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(store.os, "replace", replace)
    try:
        edit(model, lambda one: one.add(rows))
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    model.memory = Memory.open(root)
    assert len(model.memory) == (44 if finished else 40)
    if not finished:
        np.testing.assert_array_equal(model.predict_proba(asked), before)
        edit(model, lambda one: one.add(rows))  # the same edit works afterwards
        assert len(model.memory) == 44
    assert not list(root.glob("*/*.tmp"))


def test_a_full_disk_changes_nothing(model, asked, monkeypatch):
    before, names = model.predict_proba(asked), sorted(model.memory.root.rglob("*"))

    def full(path, array, real=durable.write_array):
        path.symlink_to("/dev/full")
        real(path, array)

    monkeypatch.setattr(durable, "write_array", full)
    with pytest.raises(UserError, match="disk full"):
        edit(model, lambda one: one.add(added_rows(model)))
    monkeypatch.undo()
    model.reload()
    np.testing.assert_array_equal(model.predict_proba(asked), before)
    assert sorted(model.memory.root.rglob("*")) == names


def test_a_second_writer_is_refused_and_a_reader_keeps_its_version(model, asked):
    root = model.memory.root
    reader, before = Memory.open(root), model.network(asked, model.memory).logits
    with turns.editing(root):
        refused = []

        def second():
            try:
                with turns.editing(root, wait_s=0.05):
                    pass
            except UserError as error:
                refused.append(error.what)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert "another process has been editing" in refused[0]
    edit(model, lambda one: one.remove(np.arange(20)))
    edits.compact(root)  # deletes the files that the reader has mapped
    np.testing.assert_array_equal(model.network(asked, reader).logits, before)


@pytest.mark.parametrize("damage", ["HEAD", "x.npy", "version.json", "rows.parquet"])
def test_damage_is_named(model, damage):
    root = model.memory.root
    path = next(iter(root.rglob(damage)))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage != "HEAD" else b"soon")
    with pytest.raises(UserError, match="damaged") as caught:
        Memory.open(root)
    assert damage in caught.value.where
    path.write_bytes(data)
    flipped = bytearray(data)
    flipped[-1] ^= 1
    if damage in ("x.npy", "rows.parquet"):
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="checksum"):
            store.verify(root, store.read_version(root, 0))


def test_what_is_there_already_and_unknown_keys_are_refused(model):
    rows = added_rows(model)
    edit(model, lambda one: one.add(rows))
    with pytest.raises(UserError, match="4 of these keys are already in the memory"):
        edit(model, lambda one: one.add(rows))
    again = store.NewRows(**{**vars(rows), "keys": ["a", "b", "c", "d"]})
    with pytest.raises(UserError, match="image a is already in the memory, as new-0"):
        edit(model, lambda one: one.add(again))
    with pytest.raises(UserError, match="1 of 2 keys is not in the memory: nobody"):
        edit(model, lambda one: one.remove(one.rows_of(["img-1", "nobody"])))
    assert len(model.memory) == 44


def test_an_empty_memory_answers_by_the_network_alone(model, asked):
    edit(model, lambda one: one.remove(np.arange(40)))
    out = model.network(asked, model.memory)
    np.testing.assert_array_equal(out.logits, out.self_logits)
    assert model.predict(asked[0]).path == "network"
    edit(model, lambda one: one.add(added_rows(model)))
    assert model.predict(asked[0]).path == "graph"


def test_a_copied_memory_is_whole(model, asked, tmp_path):
    edit(model, lambda one: one.remove(np.arange(5)))
    shutil.copytree(model.folder, tmp_path / "elsewhere")
    other = Classifier.open(tmp_path / "elsewhere", device="cpu", verify=True)
    np.testing.assert_array_equal(other.predict_proba(asked), model.predict_proba(asked))


def test_rows_that_meet_many_added_ones_are_compared_in_pieces(monkeypatch):
    """Comparing a large memory with all added rows at once would take gigabytes."""
    z, live = unit(60, 4, 3), np.ones(60, bool)
    base = table_of(z[:40], 5)
    whole = rewired(base, z, live)
    monkeypatch.setattr(rewiring, "CELLS", 100)
    met = []
    reached = rewiring._reached
    monkeypatch.setattr(
        rewiring, "_reached", lambda table, *rest: met.append(len(table)) or reached(table, *rest)
    )
    pieces = rewired(base, z, live)
    assert met == [5] * 8  # 20 added rows
    np.testing.assert_array_equal(pieces.ids_K, whole.ids_K)
    np.testing.assert_array_equal(pieces.rows_KM, whole.rows_KM)
