"""An image that is in the memory is recognized, whatever precision its features were computed in; others are not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing, evaluation, network
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.inputs import Input
from cnn2gnn_dist.inference.labelled_inputs import Labelled
from cnn2gnn_dist.inference.memory import edits, store
from cnn2gnn_dist.inference.memory.store import NewRows
from cnn2gnn_dist.inference.memory.view import SAME, Memory
from tests.support.models import SIZE, config, table_of

ROWS = 600


def digits() -> np.ndarray:
    """uint8 [1797, SIZE, SIZE, 3]: real images, many of which are alike."""
    gray = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    return np.repeat(gray.repeat(SIZE // 8, 1).repeat(SIZE // 8, 2)[..., None], 3, 3)


@pytest.fixture(scope="module")
def images():
    return digits()


@pytest.fixture(scope="module")
def trained(images):
    """A small student after a second of training: random features hardly tell images apart."""
    made = config(classes=10)
    wider = made.student.model_copy(update={"stem_args": {"widths": [8, 16]}, "dim": 32})
    made = made.model_copy(update={"student": wider})
    torch.manual_seed(0)
    student = network.build(made)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    labels = torch.from_numpy(load_digits().target[:ROWS])
    for _ in range(15):
        for rows in torch.randperm(ROWS).split(60):
            x, _ = student.embed(torch.from_numpy(images[rows.numpy()]))
            loss = torch.nn.functional.cross_entropy(student.gnn(x)[1], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return made, student.eval()


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def of_digits(request, images, trained, tmp_path_factory):
    """A model whose memory holds digits, with features computed as the stage graph does in this precision."""
    made, student = trained
    student.compute_dtype = getattr(torch, request.param)
    with torch.no_grad():
        x, z = student.embed(torch.from_numpy(images[:ROWS]))
    z = z.float().numpy()
    rows = NewRows(
        x=x.half().numpy(), z=z, labels=load_digits().target[:ROWS].astype(np.int32),
        candidates=table_of(z, 6), keys=[f"digit-{n}" for n in range(ROWS)],
        sources=[""] * ROWS, thumbnails=[None] * ROWS,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param) / "m"
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in student.state_dict().items()}
    save_file(weights, folder / artefact.WEIGHTS)
    (folder / artefact.CONFIG).write_text(made.model_dump_json())
    (folder / artefact.CARD).write_text("# digits\n")
    nothing = np.empty(0, np.int64)
    edits.create(folder / artefact.MEMORY, rows, made.label_names, "test", nothing)
    artefact.write_checksums(folder)
    return Classifier.open(folder, device="cpu")


def test_a_training_image_is_recognized_under_another_name_and_class(of_digits, images):
    for row in range(0, ROWS, 7):
        with pytest.raises(
            UserError, match=rf"image x\.png is already .* as digit-{row} of the"
        ) as caught:
            editing.add(of_digits, [Input("x.png", images[row])], "class 3")
        assert f"'class {load_digits().target[row]}'" in caught.value.what
        assert "relabel" in caught.value.remedy
    assert store.head(of_digits.memory.root) == 0


def test_other_images_are_not_refused(of_digits, images):
    """Also those that look like one of the memory."""
    pixels = images.reshape(len(images), -1).astype(float)
    nearest = [np.sqrt(np.square(pixels[:ROWS] - one).mean(1).min()) for one in pixels[ROWS:]]
    assert min(nearest) < 20  # of 255
    done = editing.add(
        of_digits,
        [Input(f"{n}.png", one) for n, one in enumerate(images[ROWS:])],
        "class 0",
        dry_run=True,
    )
    assert len(done.keys) == len(images) - ROWS


def test_evaluation_counts_the_same_images(of_digits, images):
    some = [Labelled(Input(f"{n}", one), 0) for n, one in enumerate(images[ROWS - 50 : ROWS + 50])]
    assert evaluation.evaluate(of_digits, some).in_memory == 50


def memory_of(root, x, labels, classes=("a", "b")):
    """A memory of these features, the same as projections; the network has learned the classes a and b."""
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = NewRows(
        x=x.astype(np.float16), z=z.astype(np.float32), labels=np.asarray(labels, np.int32),
        candidates=table_of(z.astype(np.float32), 6), keys=[f"row-{n}" for n in range(len(x))],
        sources=[""] * len(x), thumbnails=[None] * len(x),
    )  # fmt: skip
    edits.create(root, rows, list(classes), "test", np.empty(0, np.int64))
    return Memory.open(root)


def test_where_classes_have_collapsed_other_images_of_a_class_are_not_the_same(tmp_path):
    random = np.random.default_rng(0)
    labels = np.arange(200) % 2
    centers = np.array([[6.0] + [0.0] * 15, [-6.0] + [0.0] * 15])
    x = centers[labels] + 0.05 * random.standard_normal((200, 16))
    memory = memory_of(tmp_path / "m", x, labels)
    other = centers[labels] + 0.05 * random.standard_normal((200, 16))
    rows = np.argsort(np.square(other[:, None] - x[None]).sum(-1), 1)[:, :16]
    within = (
        np.square(other - x[rows[:, 0]]).sum(1) <= SAME * np.square(x - x.mean(0)).sum(1).mean()
    )
    assert within.mean() > 0.3  # the threshold alone would take them for images of the memory
    assert (memory.same(other, rows) == -1).all()
    again = x + 0.005 * random.standard_normal(x.shape)  # as rounding in training may differ
    rows = np.argsort(np.square(again[:, None] - x[None]).sum(-1), 1)[:, :16]
    np.testing.assert_array_equal(memory.same(again, rows), np.arange(200))
    alone = np.full((200, 16), -1)
    alone[:, 0] = np.arange(200)  # no other row to compare with
    np.testing.assert_array_equal(memory.same(again, alone), np.arange(200))


def test_many_images_are_compared_in_parts(tmp_path):
    x = np.random.default_rng(1).standard_normal((40, 8))
    memory = memory_of(tmp_path / "m", x, np.zeros(40))
    rows = np.tile(np.arange(16), (2500, 1))
    asked = x[np.arange(2500) % 40]
    expected = np.where(np.arange(2500) % 40 < 16, np.arange(2500) % 40, -1)
    np.testing.assert_array_equal(memory.same(asked, rows), expected)


def test_rows_of_new_classes_count_as_added_whatever_compacted_them(tmp_path):
    x = np.random.default_rng(2).standard_normal((30, 8))
    version = memory_of(tmp_path / "m", x, np.arange(30) % 3, ("a", "b", "c")).version
    classes = [replace(entry, trained=entry.name != "c") for entry in version.classes]
    memory = Memory(tmp_path / "m", replace(version, classes=classes))
    np.testing.assert_array_equal(memory.added, np.arange(30) % 3 == 2)
