"""Images added to the memory, of trained classes and of new ones, and removed again."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.answers.answer_files import writer_of
from cnn2gnn_dist.commands.model.memory import keys_from
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import answering, editing, scoring
from cnn2gnn_dist.inference.answers import Answer
from cnn2gnn_dist.inference.classifier import Classifier, load
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory import edits, store
from tests.support.models import calibrate, pictures, write_model
from tests.support.shards import encode_image


def of_new_class(count, seed=200):
    """Dark images with a red border: unlike the noise that the model knows."""
    images = pictures(count, seed) // 8
    images[:, :3], images[:, :, :3] = (250, 10, 10), (250, 10, 10)
    return images


def test_a_class_is_added_and_removed_again_bit_identically(calibrated):
    model, asked = calibrated, pictures(20, seed=8)
    before = model.predict_proba(asked)
    done = editing.add(model, list(of_new_class(6)), "framed", old_loss=30.0)
    assert done.new_class
    assert not done.errors
    assert model.classes_ == ["class 0", "class 1", "class 2", "framed"]
    chosen = next(trade for trade in done.trades if trade.old_loss == 30.0)
    assert chosen.old >= done.old_before - 30.0 - 1e-9
    answers = model.predict(of_new_class(8, seed=300))
    assert [a.label for a in answers].count("framed") >= 6
    assert {a.path for a in answers if a.label == "framed"} == {"new class"}
    np.testing.assert_allclose(model.predict_proba(asked).sum(1), 1, atol=1e-6)
    editing.remove(model, done.keys)
    after = model.predict_proba(asked)
    np.testing.assert_array_equal(after[:, :3], before)
    assert not after[:, 3].any()
    assert all(len(answer.classes) == 3 for answer in model.predict(asked))


def test_how_unusual_an_image_of_a_new_class_is_comes_from_its_answer(calibrated):
    """Not from the head, which knows neither the class nor the labels of its images."""
    editing.add(calibrated, list(of_new_class(12)), "framed", old_loss=30.0)
    found = calibrated.predict(of_new_class(8, seed=300), neighbours=10)
    assert sum(answer.label == "framed" for answer in found) >= 6
    for answer in found:
        unusual = answer.scores["unusual"]
        beside = sum(near.weight for near in answer.neighbours if near.label != answer.label)
        assert unusual["vote"] == pytest.approx(beside, abs=1e-4)
        assert unusual["softmax"] == pytest.approx(1 - answer.probability, abs=1e-4)
    assert any(one.label == "framed" and one.scores["unusual"]["vote"] < 0.1 for one in found)


def test_what_old_classes_may_lose_holds_until_another_number_is_given(calibrated):
    model = calibrated
    assert editing.add(model, list(of_new_class(5)), "framed", old_loss=20.0).old_loss == 20.0
    assert editing.add(model, list(pictures(3, seed=60)), "class 0").old_loss == 20.0
    assert editing.add(model, list(of_new_class(2, seed=201)), "framed").old_loss == 20.0
    assert model.memory.new_classes[1].old_loss == 20.0
    assert (
        editing.add(model, list(of_new_class(2, seed=202)), "framed", old_loss=3.0).old_loss == 3.0
    )


def test_a_trained_class_gets_more_images_without_calibration(model):
    done = editing.add(model, list(of_new_class(4)), "class 1")
    assert not done.new_class
    assert not done.trades
    assert model.memory.counts()[1] == 13 + 4


def test_a_new_class_needs_calibration_images(model):
    with pytest.raises(UserError, match="not calibrated") as caught:
        editing.add(model, list(of_new_class(4)), "framed")
    assert "data.calibration=" in caught.value.remedy
    assert model.memory.version.number == 0


def test_a_dry_run_changes_nothing(calibrated):
    model = calibrated
    done = editing.add(model, list(of_new_class(5)), "framed", dry_run=True)
    assert done.version is None
    assert done.trades
    assert model.memory.version.number == 0
    assert model.classes_ == ["class 0", "class 1", "class 2"]


def test_unreadable_images_are_named_and_the_others_added(model, tmp_path):
    done = editing.add(model, [*of_new_class(2), b"no image"], "class 0")
    assert [name for name, _ in done.errors] == ["input 2"]
    assert len(done.keys) == 2
    with pytest.raises(UserError, match="none of these 1 images can be read: text") as caught:
        editing.add(model, [b"no image"], "class 0")
    assert "name image files" in caught.value.remedy


def test_probabilities_are_calibrated_and_sets_have_their_coverage(calibrated):
    model = calibrated
    T = model.scoring.calibration.temperature
    out = model.network(pictures(5, seed=9), model.memory)
    expected = np.exp(out.logits / T) / np.exp(out.logits / T).sum(1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(pictures(5, seed=9)), expected, atol=1e-6)
    answers = model.predict(pictures(200, seed=3)[:60], coverage=0.8)
    with np.load(model.folder / artefact.CALIBRATION) as kept:
        names = [model.classes_[c] for c in kept["label"]]
    covered = [name in a.scores["set"] for name, a in zip(names, answers, strict=True)]
    assert np.mean(covered) >= 0.8
    assert all(a.scores["abstains"] == (len(a.scores["set"]) != 1) for a in answers)
    assert set(answers[0].scores["unusual"]) == {"softmax", "distance", "vote"}
    with pytest.raises(UserError, match="needs at least 999 calibration images"):
        model.predict(pictures(1), coverage=0.999)


def test_a_set_answers_together_only_when_asked(calibrated):
    model = calibrated
    images = np.repeat(pictures(1, seed=4), 6, axis=0)
    alone = model.predict(images)
    same = model.predict_together(list(images), same=True)
    assert {a.label for a in same} == {alone[0].label}
    assert same[0].scores["together"] == {
        "related": True, "classes": 1, "images": 6, "same": True, "elsewhere": 0, "contradicted": False,
    }  # fmt: skip
    found = model.predict_together([*images, b"no image"])
    assert found[-1].error
    assert found[0].scores["together"]["images"] == 6
    assert [a.classes for a in model.predict(images)] == [a.classes for a in alone]


def test_a_set_in_batch_scope_is_classified_in_the_batches_of_predict(tmp_path):
    """65 images are 33 and 32, each other's neighbors: not 64 and one that has none."""
    model = calibrate(write_model(tmp_path / "m", "batch"))
    images = pictures(65, seed=4)
    logits = [model.network(part, None).logits for part in (images[:33], images[33:])]
    mean = np.concatenate(logits).mean(0) / model.scoring.calibration.temperature
    mean += 64 / 65 * model.scoring.together.shift_C  # its calibration images are of uneven classes
    found = model.predict_together(list(images), same=True)
    assert found[0].probability == pytest.approx(
        (np.exp(mean) / np.exp(mean).sum()).max(), abs=1e-6
    )


def test_outputs_that_are_not_finite_calibrate_nothing(calibrated):
    path = calibrated.folder / artefact.CALIBRATION
    with np.load(path) as kept:
        columns = dict(kept)
    columns["logits"][5, 1] = np.nan
    np.savez(path, **columns)
    with pytest.raises(UserError, match="outputs for 1 of 60 calibration images are not") as raised:
        scoring.write(calibrated.folder)
    assert raised.value.where == "the stage student"


def test_too_many_images_for_one_set_are_refused(calibrated, monkeypatch):
    monkeypatch.setattr(answering, "MOST_TOGETHER", 5)
    images = pictures(6, seed=4)
    assert len(calibrated.predict_together(images[:5])) == 5
    assert len(calibrated.predict_together(images, same=True)) == 6
    with pytest.raises(UserError, match="more than 5 images to answer together") as caught:
        calibrated.predict_together(images)
    assert "one burst" in caught.value.remedy


def test_the_commands_edit_and_tell(calibrated, tmp_path, capsys):
    folder, images = calibrated.folder, tmp_path / "framed"
    images.mkdir()
    for number, image in enumerate(of_new_class(4)):
        (images / f"f{number}.png").write_bytes(encode_image(image))

    def call(*arguments):
        code = cli.main(list(map(str, arguments)))
        return code, capsys.readouterr()

    code, told = call("memory", "add", folder, images, "--class", "framed", "--dry-run")
    assert code == 0
    assert "would add 4 images of 'framed', a new class" in told.out
    assert "<- this one (--old-loss)" in told.out
    assert call("memory", "add", folder, images, "--class", "framed")[0] == 0
    code, told = call("memory", "add", folder, images, "--class", "framed")
    assert code == 2
    assert "already in the memory: f0.png" in told.err
    assert "       4  framed  (new)" in call("memory", "ls", folder)[1].out
    told = call("memory", "ls", folder, "--class", "framed ")
    assert told[1].out.endswith("4  framed  (new)\n")
    assert call("memory", "ls", folder, "--keys", "--class", "framed")[1].out.splitlines() == [
        f"f{n}.png\tframed" for n in range(4)
    ]
    assert call("memory", "relabel", folder, "f0.png", "--class", "nothing")[0] == 2
    assert call("memory", "relabel", folder, "f0.png", "--class", "class 2")[0] == 0
    (tmp_path / "keys.csv").write_text("key,class\nf1.png,x\nf2.png,y\n")
    told = call("memory", "remove", folder, "--from", tmp_path / "keys.csv")[1].out
    assert "remove 2 images; 42 images" in told
    assert call("memory", "undo", folder)[0] == 0
    log = call("memory", "log", folder)[1].out.splitlines()
    assert [line.split("  ")[-1] for line in log] == [
        "relabel 1 image to 'class 2'",
        "add 4 images of 'framed'",
        "test",
    ]
    told = call("memory", "forget", folder, "f3.png", "img-3")[1].out
    assert "not undone: the network's weights" in told
    assert call("memory", "undo", folder)[0] == 2
    assert call("memory", "remove", folder, "f1.png", "f2.png")[0] == 0
    code, told = call("predict", "--model", folder, images / "f1.png", "--json")
    assert code == 0
    assert json.loads(told.out)["path"] == "graph"


def test_a_memory_without_thumbnails_gets_none(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.support.models.encode_image", lambda _: None)
    model = load(write_model(tmp_path / "m"), device="cpu")
    done = editing.add(model, list(of_new_class(3)), " class 1 ")
    assert (done.class_name, done.version.action) == ("class 1", "add 3 images of 'class 1'")
    assert model.memory.thumbnails(model.memory.live_ids) == [None] * 43


@pytest.mark.parametrize("side", [16, 24, 64])
def test_thumbnails_of_added_images_are_resized_as_the_others_are(tmp_path, monkeypatch, side):
    """Views have 16 pixels here; ImageNet's have 224, and memories of thumbnails of 64."""

    def resized(image):
        return encode_image(np.asarray(Image.fromarray(image).resize((side, side))))

    monkeypatch.setattr("tests.support.models.encode_image", resized)
    model = load(write_model(tmp_path / "m"), device="cpu")
    images = of_new_class(2)
    done = editing.add(model, list(images), "class 1")
    rows = model.memory.ids_of(done.keys)
    for key, image in zip(done.keys, images, strict=True):
        found = Image.open(io.BytesIO(model.memory.thumbnail(rows[key])))
        assert found.size == (side, side)
        wanted = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        assert np.abs(np.asarray(found, float) - wanted).mean() < 20


def test_what_is_told_before_the_commit_is_what_is_committed(calibrated):
    seen = []

    def tell(planned):
        assert store.head(calibrated.memory.root) == 0
        with pytest.raises(UserError, match="another process has been editing"):
            editing.remove(Classifier.open(calibrated.folder, device="cpu"), ["img-1"], wait_s=0.01)
        seen.append(planned)

    done = editing.add(calibrated, list(of_new_class(5)), "framed", old_loss=3.0, tell=tell)
    assert [replace(done, version=None)] == seen
    kept = calibrated.memory.new_classes[1]
    assert (kept.trades, kept.old_loss) == (seen[0].trades, 3.0)
    with pytest.raises(BrokenPipeError):  # the reader of the table has gone away
        editing.add(
            calibrated, list(of_new_class(2, seed=5)), "framed",
            tell=lambda _: (_ for _ in ()).throw(BrokenPipeError),
        )  # fmt: skip
    assert store.head(calibrated.memory.root) == 1


def test_the_command_prints_the_predictions_before_it_commits(calibrated, tmp_path, monkeypatch):
    (tmp_path / "f.png").write_bytes(encode_image(of_new_class(1)[0]))
    printed = []

    def commit(self, action, real=edits.Edit.commit, **options):
        printed.append("commit")
        return real(self, action, **options)

    monkeypatch.setattr(edits.Edit, "commit", commit)
    monkeypatch.setattr("cnn2gnn_dist.commands.model.memory.output", printed.append)
    folder = str(calibrated.folder)
    assert cli.main(["memory", "add", folder, str(tmp_path / "f.png"), "--class", "framed"]) == 0
    assert printed[0] == "adding 1 image of 'framed', a new class"
    assert "<- this one (--old-loss)" in printed[1]
    assert printed[2] == "commit"
    assert printed[3].startswith("version 1: add 1 image of 'framed'")


def test_a_folder_may_have_the_name_of_an_unnamed_input(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input photos").mkdir()
    images = of_new_class(2)
    for name, image in zip("ab", images, strict=True):
        (tmp_path / "input photos" / f"{name}.png").write_bytes(encode_image(image))
    assert editing.add(model, "input photos", "class 0").keys == ["a.png", "b.png"]
    assert editing.add(model, of_new_class(1, seed=9)[0], "class 0").keys[0].startswith("image-")


def test_keys_from_files(tmp_path):
    def read(text):
        (tmp_path / "keys").write_bytes(text.encode())
        return keys_from(tmp_path / "keys")

    assert read("a.jpg\nb,2.jpg\r\n\n'c' \"d\".jpg\n") == ["a.jpg", "b,2.jpg", "'c' \"d\".jpg"]
    assert read("a.jpg\tclass 1\nb c.jpg\tclass 2\n") == ["a.jpg", "b c.jpg"]
    assert read('\ufeffclass,key\nx,"b,2.jpg"\ny,c\n') == ["b,2.jpg", "c"]
    assert read("") == []
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="this list of keys can't be read"):
        keys_from(tmp_path / "keys")


def test_numbers_that_make_no_sense_are_refused(model):
    image = pictures(1)[0]
    for wrong in ({"top": 0}, {"top": 2.5}, {"neighbours": -1}):
        with pytest.raises(UserError, match="=") as caught:
            model.predict(image, **wrong)
        assert "a whole number" in caught.value.remedy
    for wrong in (0, -1, 1.5):
        with pytest.raises(UserError, match="n_neighbors="):
            model.kneighbors(image, wrong)


def test_answers_are_written_as_files(model, tmp_path):
    import csv

    import pyarrow.parquet as pq

    answers = model.predict([*pictures(3, seed=1), b"no image"])
    for kind in ("jsonl", "csv", "parquet", "html"):
        with writer_of(tmp_path / f"a.{kind}") as write:
            for answer in answers:
                write(answer)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [a.as_dict() for a in answers]
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["class"] for row in rows] == [a.label or "" for a in answers]
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["probability"] for row in table] == [a.probability for a in answers]
    assert table[3]["error"]
    page = (tmp_path / "a.html").read_text()
    assert page.count("<article") == 4
    assert page.count("data:image") == sum(len(a.neighbours) for a in answers)
    with pytest.raises(UserError, match=r"answers can.t be written in this format: \.xlsx"):
        writer_of(tmp_path / "a.xlsx")


def test_of_two_classes_with_one_name_a_table_has_the_probability_of_the_answer(tmp_path):
    shares = (("crane", 0.6), ("dog", 0.3), ("crane", 0.1))
    with writer_of(tmp_path / "a.csv") as write:
        write(Answer("a.jpg", "crane", 0.6, shares))
    with open(tmp_path / "a.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(json.loads(row["classes"]).items()) == [("crane", 0.6), ("dog", 0.3)]


def test_the_name_of_two_classes_is_refused_and_not_taken_for_the_first(tmp_path, capsys):
    """ImageNet has two cranes."""
    folder = write_model(tmp_path / "m")
    root = folder / artefact.MEMORY
    version = store.read_version(root, 0)
    names = [store.ClassEntry(name, True) for name in ("crane", "class 1", "crane")]
    store.write_version(root, replace(version, number=1, classes=tuple(names)), {})
    model = Classifier.open(folder, device="cpu")
    for change in (
        lambda: editing.relabel(model, ["img-1"], "crane"),
        lambda: editing.relabel(model, ["img-1"], " crane"),
        lambda: editing.add(model, list(of_new_class(2)), "crane"),
    ):
        with pytest.raises(UserError, match="2 classes of the memory have the name 'crane'"):
            change()
    assert store.head(root) == 1
    editing.relabel(model, ["img-0"], "class 1")
    assert cli.main(["memory", "ls", str(folder), "--keys", "--class", "crane"]) == 0
    listed = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [f"img-{n}" for n in range(1, 40) if n % 3 != 1]
