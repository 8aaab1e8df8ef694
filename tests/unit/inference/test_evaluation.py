"""`evaluate --model`: the figures of scikit-learn, from any kind of labeled images."""

import gzip
import json
import resource
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.answers import evaluate
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import evaluation, scoring
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.inputs import Input, Pixels
from cnn2gnn_dist.inference.labelled_inputs import Labelled, labelled
from tests.support.models import pictures, write_model
from tests.support.shards import encode_image, make_shards

COUNT = 70  # more than a batch
NAMES = [f"class {c}" for c in range(3)]


@pytest.fixture(scope="module")
def images():
    return pictures(COUNT, seed=9)


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(2).integers(0, 3, COUNT)


def in_folder(root, images, labels, names=NAMES):
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = root / names[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:04d}.png").write_bytes(encode_image(image))
    return str(root)


def in_parquet(file, images, labels, column="label", **metadata):
    table = pa.table({"image": [{"bytes": encode_image(i)} for i in images], column: labels})
    pq.write_table(table.replace_schema_metadata(metadata or None), file)
    return str(file)


def named(names):
    """Hugging Face's metadata that name the classes of a column `label`."""
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}


def given(images, labels):
    return [
        Labelled(Input(f"{n}", image), int(label))
        for n, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def test_spellings_of_a_name_are_one_class_as_in_training(images, labels, tmp_path):
    composed = ["\u00e9t\u00e9", "b", "c"]
    written = ["e\u0301te\u0301", " b", "c"]  # a folder copied from macOS; a blank at one end
    path = in_folder(tmp_path / "test", images, labels, written)
    found = {one.image.name: one.label for one in labelled([path], composed)}
    assert found == {
        f"{path}/{written[label]}/{number:04d}.png": label for number, label in enumerate(labels)
    }


def test_figures_are_those_of_scikit_learn(model, images, labels):
    found = evaluation.evaluate(model, given(images, labels))
    made = model.outputs([Pixels("", image) for image in images])
    of_row = {
        "answers": model.predict_proba(images),
        "self path": np.exp(made.self_logits) / np.exp(made.self_logits).sum(1, keepdims=True),
        "vote": scoring.votes(made, model.memory, 3),
    }
    assert set(found.rows) == set(of_row)
    for name, p_NC in of_row.items():
        row, said = found.rows[name], p_NC.argmax(1)
        assert row["accuracy"] == metrics.accuracy_score(labels, said)
        assert row["balanced_accuracy"] == pytest.approx(
            metrics.balanced_accuracy_score(labels, said)
        )
        assert row["standard_error"] == pytest.approx((said == labels).std() / COUNT**0.5)
        # Of three classes, all but those that no neighbor has.
        assert row["top5"] == (p_NC[np.arange(COUNT), labels] > 0).mean()
    said = of_row["answers"].argmax(1)
    assert found.confusion_CC.tolist() == metrics.confusion_matrix(labels, said).tolist()
    assert list(found.recall().values()) == pytest.approx(
        metrics.recall_score(labels, said, average=None)
    )
    wrong = sum(count for _, _, count in found.confused(100))
    assert wrong == (said != labels).sum()
    assert found.images == COUNT


def test_top_five_of_nine_classes(tmp_path, images):
    model = Classifier.open(write_model(tmp_path / "m", classes=9), device="cpu")
    labels = np.arange(COUNT) % 9
    found = evaluation.evaluate(model, given(images, labels))
    p_NC = model.predict_proba(images)
    expected = metrics.top_k_accuracy_score(labels, p_NC, k=5)
    assert found.rows["answers"]["top5"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_folders_shards_and_parquet_give_the_same(model, images, labels, tmp_path):
    shards = make_shards(tmp_path / "s", images, labels, shard_size=40)
    (tmp_path / "s" / "shard-classes.json").write_text(json.dumps(NAMES))
    text = [NAMES[label] for label in labels]
    reversed_names = named(NAMES[::-1])
    places = {
        "folder": [in_folder(tmp_path / "f", images, labels)],
        "shards": [str(shard) for shard in shards],
        "text": [in_parquet(tmp_path / "t.parquet", images, text)],
        "numbers": [in_parquet(tmp_path / "n.parquet", images, labels)],
        "named": [in_parquet(tmp_path / "r.parquet", images, 2 - labels, **reversed_names)],
    }
    expected = evaluation.evaluate(model, given(images, labels)).confusion_CC
    for kind, paths in places.items():
        found = evaluation.evaluate(model, labelled(paths, model.classes_))
        assert found.confusion_CC.tolist() == expected.tolist(), kind


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_in_a_folder_are_to_be_named(images, labels, tmp_path, kind):
    folder = tmp_path / "my shards"
    folder.mkdir()
    if kind == "tar":
        make_shards(folder, images, labels)
    else:
        in_parquet(folder / "a.parquet", images, labels)
    with pytest.raises(UserError, match="no class folders with images") as caught:
        next(labelled([str(folder)], NAMES))
    assert caught.value.remedy == f"name the files in it: '{folder}/'*.{kind}"


def test_compressed_shards_in_a_folder_are_to_be_decompressed(images, labels, tmp_path):
    """Their images are read by their places in the file: naming the files would be refused next."""
    (shard,) = make_shards(tmp_path, images, labels, shard_size=COUNT)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    for path in ("s", "s/a.tar.gz"):
        with pytest.raises(UserError) as caught:
            next(labelled([str(tmp_path / path)], NAMES))
        assert "decompress" in caught.value.remedy
    (tmp_path / "s" / "a.tar").write_bytes(shard.read_bytes())
    with pytest.raises(UserError) as caught:
        next(labelled([str(tmp_path / "s")], NAMES))
    assert caught.value.remedy == f"name the files in it: {tmp_path}/s/*.tar"


@pytest.mark.parametrize("scope", ["batch", "none"])
def test_other_scopes(tmp_path, images, labels, scope):
    """Batches are those of ``predict``; there is no vote without a memory."""
    model = Classifier.open(write_model(tmp_path / "m", scope), device="cpu")
    found = evaluation.evaluate(model, given(images, labels))
    said = model.predict_proba(images).argmax(1)
    assert found.confusion_CC.tolist() == metrics.confusion_matrix(labels, said).tolist()
    assert set(found.rows) == {"answers"}


def test_images_of_the_memory_are_noticed(model, images, labels):
    own = pictures(40)[:4]  # those of the memory
    found = evaluation.evaluate(model, given([*images, *own], [*labels, 0, 1, 2, 0]))
    assert found.in_memory == 4


def test_unreadable_images_are_left_out_and_named(model, images, labels):
    broken = Labelled(Input("broken.png", b"nothing"), 1)
    found = evaluation.evaluate(model, [*given(images, labels), broken])
    assert found.images == COUNT
    assert [name for name, _ in found.unreadable] == ["broken.png"]
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        evaluation.evaluate(model, [broken])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root, i, n: in_folder(root / "f", i, n, ["dog", "class 1", "cat"]), "2 of the 3 classes"),
        (lambda root, i, n: in_parquet(root / "p.parquet", i, n + 1), "a label 3, but the model"),
        (lambda root, i, n: in_parquet(root / "p.parquet", i, n, "y"), "no column"),
        (lambda root, i, n: str(root / "none"), "no such file"),
        (lambda root, i, n: write(root / "a.png", encode_image(i[0])), "alone has no label"),
        (lambda root, i, n: write(root / "d" / "a.png", encode_image(i[0])).rpartition("/")[0], "no class folders"),
        (lambda root, i, n: str(make_shards(root / "s", i, None)[0]), "has no label"),
        (lambda root, i, n: in_parquet(root / "p.parquet", i, n - 1), "has no label"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(model, images, labels, tmp_path, make, said):
    with pytest.raises(UserError, match=said) as caught:
        list(labelled([make(tmp_path, images, labels)], model.classes_))
    assert caught.value.remedy


@pytest.mark.parametrize("names", [["1", "2", "3"], [*map(str, sorted(range(12), key=str))]])
def test_numbers_that_may_be_names_or_places_are_refused(images, labels, tmp_path, names):
    """Each file alone would seem to say one or the other, and files of one set not the same."""
    shards = make_shards(tmp_path / "s", images, labels, shard_size=1)
    for shard in shards[:3]:
        with pytest.raises(UserError, match=f"'{names[-1]}' has place {len(names) - 1}") as caught:
            list(labelled([str(shard)], names))
        assert "FOLDER/CLASS/IMAGE" in caught.value.remedy


def test_numbers_are_those_of_numbered_classes(images, labels, tmp_path):
    shards = make_shards(tmp_path / "s", images, labels, shard_size=40)
    found = [one.label for shard in shards for one in labelled([str(shard)], [*map(str, range(3))])]
    assert found == labels.tolist()
    with pytest.raises(UserError, match="'2'"):
        list(labelled([str(one) for one in shards], ["0", "1"]))


@pytest.mark.parametrize("names", [["0", "1", "2", "lynx"], ["00", "01", "02"]])
def test_numbers_are_those_of_numbered_classes_with_others_added_or_padded(
    images, labels, tmp_path, names
):
    path = str(make_shards(tmp_path / "s", images, labels, shard_size=COUNT)[0])
    assert [one.label for one in labelled([path], names)] == labels.tolist()
    beyond = in_parquet(tmp_path / "p.parquet", images, labels + 1)
    with pytest.raises(UserError, match=f"with {(labels == 2).sum()} images, .*: '3'; it has"):
        list(labelled([beyond], names))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def test_the_command(written, images, labels, tmp_path, capsys):
    folder = in_folder(tmp_path / "f", images, labels)
    out = tmp_path / "figures.json"
    asked = ["evaluate", "--model", str(written), folder]
    assert cli.main([*asked, "--out", str(out)]) == 0
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert found["images"] == COUNT
    assert f"{found['rows']['answers']['accuracy']:.2%}" in printed
    assert np.trace(found["confusion"]) == round(COUNT * found["rows"]["answers"]["accuracy"])
    (tmp_path / "f" / "class 1" / "bad.png").write_bytes(b"nothing")
    assert cli.main(asked) == 1


def test_patterns_that_a_shell_leaves_as_they_are(written, images, labels, tmp_path, capsys):
    for name, part in (("a[1]", slice(0, 30)), ("b2", slice(30, 50)), ("c3", slice(50, 70))):
        in_parquet(tmp_path / f"{name}.parquet", images[part], labels[part], **named(NAMES))
    asked = ["evaluate", "--model", str(written)]
    for pattern, count in (("[ab]*.parquet", 50), ("*", 70), ("a[1].parquet", 30)):
        assert cli.main([*asked, str(tmp_path / pattern)]) == 0
        assert f"{count} images of 3 classes" in capsys.readouterr().out
    for pattern in ("test-*.tar", "test-?.parquet"):
        assert cli.main([*asked, str(tmp_path / pattern)]) == 2
        told = capsys.readouterr().err
        assert f"nothing matches this pattern\n  where:  {tmp_path / pattern}\n" in told


def test_figures_that_do_not_fit_leave_the_old_file(written, images, labels, tmp_path, monkeypatch):
    folder, out = in_folder(tmp_path / "f", images, labels), tmp_path / "figures.json"
    out.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_more(found):  # from here on: what was written before has had room
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        return "table"

    monkeypatch.setattr(evaluate, "table", no_more)
    try:
        with pytest.raises(OSError, match="File too large"):
            evaluate.command(written, [folder], out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"f", "figures.json"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "M"], "no labeled images"),
        (["--model", "M", "x", "--force"], "not for a model"),
        (["--model", "M", "x", "--out", "f.csv"], "as JSON"),
        (["--out", "f.json"], "are for a model"),
        (["M"], "cnn2gnn evaluate --model FOLDER"),
    ],
)
def test_wrong_options(written, arguments, said, capsys):
    asked = [str(written) if text == "M" else text for text in arguments]
    assert cli.main(["evaluate", *asked]) == 2
    assert said in capsys.readouterr().err


def test_a_model_is_found_where_it_was_moved(written, images, labels, tmp_path, capsys):
    shutil.copytree(written, tmp_path / "elsewhere" / "m")
    folder = in_folder(tmp_path / "f", images, labels)
    assert cli.main(["evaluate", "--model", str(tmp_path / "elsewhere" / "m"), folder]) == 0
