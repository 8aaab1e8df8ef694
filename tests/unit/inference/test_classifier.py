"""The API: what it accepts, what it answers, what it refuses."""

import io
import json
import shutil
import tarfile
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import cnn2gnn_dist
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.models.graph_head import adaptive_neighbours
from tests.support.models import NEAR, SLOTS, pictures, write_model
from tests.support.shards import encode_image


@pytest.fixture
def asked():
    return pictures(9, seed=7)


def test_a_model_is_shown_by_what_it_holds(model, tmp_path):
    folder = str(tmp_path / "m")
    assert (
        repr(model) == f"<Classifier '{folder}': 3 classes, 40 images in version 0 of the memory>"
    )
    editing.remove(model, ["img-1"])
    assert "39 images in version 1 of the memory" in repr(model)
    alone = Classifier.open(write_model(tmp_path / "control", "none"), device="cpu")
    assert repr(alone) == f"<Classifier '{tmp_path / 'control'}': 3 classes>"


def test_every_kind_of_input_gives_the_same_answer(model, asked, tmp_path):
    expected = model.predict(asked[0])
    data = encode_image(asked[0])
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(data)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in (("k.png", data), ("k.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pq.write_table(
        pa.table({"image": [{"bytes": data, "path": "x"}], "label": [1]}), tmp_path / "p.parquet"
    )
    singles = [folder / "a.png", str(folder / "a.png"), data, Image.open(io.BytesIO(data))]
    for one in singles:
        assert model.predict(one).classes == expected.classes
    for many in ([asked[0]], asked[:1], folder, tmp_path / "s.tar", tmp_path / "p.parquet"):
        (answer,) = model.predict(many)
        assert answer.classes == expected.classes
    assert model.predict(tmp_path / "s.tar")[0].name == f"{tmp_path}/s.tar/k.png"
    grey = np.asarray(asked[0][:, :, 0])
    assert model.predict(grey).classes == model.predict(np.stack([grey] * 3, 2)).classes


def test_an_unreadable_input_is_an_answer_and_the_others_are_answered(model, asked, tmp_path):
    given = [
        asked[0],
        b"nothing",
        tmp_path / "none.png",
        asked[1].astype(float),
        asked[1],
        object(),
    ]
    answers = model.predict(given)
    assert [a.error is None for a in answers] == [True, False, False, False, True, False]
    assert "No such file" in answers[2].error
    assert "float64" in answers[3].error
    assert answers[4].classes == model.predict(asked[1]).classes
    assert answers[1].as_dict() == {"image": "input 1", "error": answers[1].error}
    assert np.isnan(model.predict_proba(given)[1]).all()


def test_an_answer_shows_its_evidence(model, asked):
    answer = model.predict(asked[0], top=2, neighbours=4)
    probability = model.predict_proba(asked[:1])[0]
    assert answer.label == model.classes_[probability.argmax()]
    assert answer.probability == pytest.approx(probability.max())
    assert len(answer.classes) == 2
    assert answer.top(1) == answer.classes[:1]
    weights = [n.weight for n in answer.neighbours]
    assert weights == sorted(weights, reverse=True)
    assert 0 < sum(weights) <= 1 + 1e-6
    for near in answer.neighbours:
        row = int(near.key.removeprefix("img-"))
        assert near.label == f"class {row % 3}"
        np.testing.assert_array_equal(np.asarray(near.image()), pictures(40)[row])


def test_the_network_is_the_students_dense_mathematics(model, asked):
    """Computed on the full graph at once: p over all rows, the second hop over complete candidate rows."""
    memory, student = model.memory, model.network.student
    out = model.network(asked, memory)
    everything = np.arange(40)
    x, z = torch.from_numpy(memory.x(everything)).float(), torch.from_numpy(memory.z(everything))
    table = torch.from_numpy(memory.candidates(everything)).long()
    P = torch.zeros(40, 40)
    near = (z[table] - z[:, None]).square().sum(-1)
    P.scatter_(1, table, adaptive_neighbours(near, NEAR).p_BM)
    live_x, live_z = (torch.from_numpy(v) for v in (out.x, out.z))
    apart = (live_z[:, None] - z).square().sum(-1)
    first = apart.argsort(1)[:, :SLOTS]
    p = torch.zeros(len(asked), 40).scatter_(
        1, first, adaptive_neighbours(apart.gather(1, first), NEAR).p_BM
    )
    g = student.gnn
    with torch.no_grad():
        h = torch.relu(g.self1(x) + g.gate1 * g.neighbour1(P @ x))
        own = torch.relu(g.self1(live_x) + g.gate1 * g.neighbour1(p @ x))
        label = g.label(torch.from_numpy(memory.labels).long())
        logits = g.self2(own) + g.gate2 * g.neighbour2(torch.cat([p @ h, p @ label], 1))
    np.testing.assert_allclose(out.logits, logits.numpy(), atol=1e-5)
    assert np.abs(out.logits - out.self_logits).max() > 1e-3


def test_neighbours_and_embeddings_are_those_of_brute_force(model, asked):
    distances, keys = model.kneighbors(asked, 3)
    z = np.stack([row for _, _, row in model.embed(asked)])
    every = np.linalg.norm(model.memory.z(np.arange(40)) - z[:, None], axis=-1)
    order = np.argsort(every, axis=1, kind="stable")[:, :3]
    np.testing.assert_allclose(distances, np.take_along_axis(every, order, 1), atol=1e-5)
    assert keys == [[f"img-{row}" for row in rows] for rows in order]
    with pytest.raises(UserError, match="41 neighbors are requested"):
        model.kneighbors(asked, 41)


@pytest.mark.parametrize("scope", ["none", "batch"])
def test_models_without_a_memory_answer(tmp_path, asked, scope):
    model = Classifier.open(write_model(tmp_path / "m", scope), device="cpu")
    assert model.memory is None
    answers = model.predict(asked)
    assert {a.path for a in answers} == {"graph" if scope == "batch" else "network"}
    with pytest.raises(UserError, match="has no memory"):
        model.kneighbors(asked)


def test_it_is_saved_and_loaded_as_the_hub_does(model, asked, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = Classifier.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(asked), model.predict_proba(asked))
    assert cnn2gnn_dist.load(tmp_path / "saved").classes_ == ["class 0", "class 1", "class 2"]
    assert (tmp_path / "saved" / "README.md").read_text().startswith("# small")


def test_threads_get_the_answers_of_one(model, asked):
    expected = [a.classes for a in model.predict(asked)]
    found = {}

    def ask(number):
        found[number] = [a.classes for a in model.predict(asked)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (artefact.CONFIG, "damaged|not a model"),
        (artefact.WEIGHTS, "damaged"),
        (artefact.CHECKSUMS, "damaged|not a model"),
    ],
)
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_model_is_named(model, name, message, how):
    path = model.folder / name
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        Classifier.open(model.folder, device="cpu")
    assert caught.value.remedy


def test_a_newer_model_and_other_folders_are_refused(model, tmp_path):
    tree = json.loads((model.folder / artefact.CONFIG).read_text())
    (model.folder / artefact.CONFIG).write_text(json.dumps(tree | {"format": 99, "version": "9"}))
    with pytest.raises(UserError, match="written by a newer version"):
        Classifier.open(model.folder)
    (model.folder / artefact.CONFIG).write_text('{"architectures": ["Bert"]}')
    with pytest.raises(UserError, match="another library's"):
        Classifier.open(model.folder)
    with pytest.raises(UserError, match="not a model"):
        cnn2gnn_dist.load(tmp_path / "nowhere")


def test_a_memory_that_is_missing_is_damage(model):
    shutil.rmtree(model.folder / "memory")
    with pytest.raises(UserError, match="damaged: it is missing"):
        Classifier.open(model.folder)


def test_batches_of_no_images_are_refused_and_not_taken_for_no_answers(model, asked):
    with pytest.raises(UserError, match="batch=0"):
        list(model.stream(asked, batch=0))


def test_answers_while_the_memory_is_replaced_are_of_one_version(model, asked):
    """A call keeps the version with which it began."""
    before = model.predict_proba(asked)
    stream = model.stream(list(asked) * 20, batch=9)
    first = next(stream)
    model.memory = Memory.open(model.memory.root)
    model.memory.live[:] = False  # whatever another version would answer
    rest = [first, *stream]
    assert {a.label for a in rest[:9]} == {a.label for a in rest[9:18]}
    np.testing.assert_allclose([a.probability for a in rest[-9:]], before.max(1), atol=1e-7)
