"""An audit in a model's folder shows its images: a forgotten one leaves it, and no copy has one."""

import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.audit import command
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory import decisions, edits, store
from cnn2gnn_dist.inference.memory.view import forgotten
from cnn2gnn_dist.serving.live import LiveModel
from tests.support.models import pictures, write_model

MADE = (
    "index.html",
    "map.parquet",
    *(f"{name}.parquet" for name in ("labels", "hubs", "outliers")),
)


def test_forgetting_deletes_the_audit_and_keeps_the_decisions_on_others(model, tmp_path, caplog):
    audit = model.folder / artefact.AUDIT
    assert cli.main(["audit", str(model.folder), "--csv"]) == 0
    (tmp_path / "labels.csv").write_text("key,class\nimg-7,class 2\nimg-8,drop\n")
    assert cli.main(["audit", str(model.folder), "--fix", str(tmp_path / "labels.csv")]) == 0
    assert all((audit / name).is_file() for name in MADE)
    shown = pq.read_table(audit / "map.parquet")["image"][7].as_py()
    assert shown["bytes"] == model.memory.thumbnail(7)
    with caplog.at_level("INFO"):
        editing.forget(model, ["img-7", "img-9"])
    assert f"the audit in {audit} showed these images, and is deleted" in caplog.text
    assert [path.name for path in audit.iterdir()] == ["relabel.csv"]
    assert (audit / "relabel.csv").read_text() == (
        "key,class\nimg-8,drop\nimg-7,drop?\nimg-9,drop?\n"
    )


def test_decisions_that_a_person_has_put_there_stay(model):
    """They have the name of one of the tables."""
    audit = model.folder / artefact.AUDIT
    audit.mkdir()
    (audit / "labels.csv").write_text("key,class\nimg-7,class 2\nimg-8,drop\n")
    (audit / "hubs.csv").write_text("key,class,in_degree,same_class\nimg-7,class 1,3,1\n")
    editing.forget(model, ["img-7"])
    assert [path.name for path in audit.iterdir()] == ["labels.csv"]
    assert (audit / "labels.csv").read_text() == "key,class\nimg-8,drop\nimg-7,drop?\n"


def test_decisions_with_other_columns_stay_in_their_order(model):
    """As a spreadsheet saves them; only the audit's own table has a suggested class."""
    audit = model.folder / artefact.AUDIT
    audit.mkdir()
    (audit / "labels.csv").write_text(
        "class,note,key\nclass 2,a cat,img-7\ndrop,img-7 again,img-8\n\nshort\n"
    )
    editing.forget(model, ["img-7", "img-9"])
    assert (audit / "labels.csv").read_text() == (
        "class,note,key\ndrop,img-7 again,img-8\nshort\ndrop?,,img-7\ndrop?,,img-9\n"
    )
    for text in ("", "image,class\nimg-7,class 1\n"):  # no list of decisions
        (audit / "labels.csv").write_text(text)
        editing.forget(model, ["img-8"] if not text else ["img-10"])
        assert (audit / "labels.csv").read_text() == text
    (audit / "labels.csv").write_text("key,class,suggested,score\nimg-3,class 1,class 2,0.5\n")
    editing.forget(model, ["img-11"])
    assert not audit.exists()


def test_a_kill_leaves_no_line_under_the_name_that_the_list_of_the_training_has(model, monkeypatch):
    decisions.record(model.memory.root, [("a/img-3", "class 1", "img-3")])
    audit = model.folder / artefact.AUDIT
    audit.mkdir()
    (audit / "labels.csv").write_text("key,class\na/img-3,class 2\nimg-8,drop\n")
    monkeypatch.setattr(edits, "_compact", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        editing.forget(model, ["img-3"])
    monkeypatch.undo()
    editing.forget(model, ["img-3"])
    kept = (audit / "labels.csv").read_text().splitlines()
    assert kept == ["key,class", "img-8,drop", "a/img-3,drop?", "img-3,drop?"]


def test_an_audit_that_can_not_be_deleted_is_named_before_the_image_is_gone(model):
    """What is refused isn't done, so that a server answers from the version on disk."""
    audit = model.folder / artefact.AUDIT
    audit.mkdir()
    (audit / "labels.csv").write_bytes(b"key,class\n\xff,drop\n")
    live, root = LiveModel(model), model.memory.root
    with pytest.raises(UserError, match=r"can't be deleted.*still in the memory"):
        live.edit(lambda beside: editing.forget(beside, ["img-7"]))
    assert live.version == store.head(root) == 0
    assert forgotten(root) == ["img-7"]
    (audit / "labels.csv").unlink()
    live.edit(lambda beside: editing.forget(beside, ["img-7"]))
    assert live.version == store.head(root) == 2
    assert "img-7" not in store.keys_on_disk(root)


@pytest.mark.parametrize("out", ["m/audit", "out"])
@pytest.mark.parametrize("late", ["write_page", "_write_map"])
def test_an_image_that_is_forgotten_during_an_audit_is_not_shown_by_it(
    model, tmp_path, monkeypatch, capsys, late, out
):
    """The audit opened the memory before. What it writes then comes after ``forget`` has deleted the rest."""
    editing.forget(model, ["img-2", "img-3"])
    editing.add(model, list(pictures(1, seed=50)), "class 0")
    added = next(key for key in model.memory.keys(model.memory.live_ids) if key[:4] != "img-")
    write = getattr(command, late)

    def forget_first(*arguments):
        editing.forget(Classifier.open(model.folder, device="cpu"), ["img-7", added])
        write(*arguments)

    audit = tmp_path / out
    monkeypatch.setattr(command, late, forget_first)
    assert cli.main(["audit", str(model.folder), "--out", str(audit)]) == 2
    said = capsys.readouterr().err
    assert "2 of these images were forgotten while the audit was made" in said
    assert "run the command again" in said
    assert not audit.exists()
    monkeypatch.undo()
    again = Classifier.open(model.folder, device="cpu")
    editing.add(again, list(pictures(1, seed=50)), "class 0")  # under a key that is on the list
    assert added in forgotten(model.memory.root)
    assert cli.main(["audit", str(model.folder), "--out", str(audit)]) == 0
    shown = pq.read_table(audit / "map.parquet", columns=["key"])["key"].to_pylist()
    assert added in shown
    assert not {"img-2", "img-3", "img-7"}.intersection(shown)


def test_an_audit_that_is_deleted_under_way_is_not_said_to_be_there(
    calibrated, monkeypatch, capsys
):
    """Forgetting an image that it does not show deletes it all the same."""
    folder, write = calibrated.folder, command._write_map

    def forget_first(*arguments):
        editing.forget(Classifier.open(folder, device="cpu"), ["apart-7"])
        write(*arguments)

    monkeypatch.setattr(command, "_write_map", forget_first)
    assert cli.main(["audit", str(folder)]) == 2
    told = capsys.readouterr()
    assert "other images of the model were forgotten while the audit was made" in told.err
    assert "look  " not in told.out
    assert not (folder / artefact.AUDIT).exists()
    monkeypatch.undo()
    find = command.audit  # before anything is written, there is nothing to delete

    def forget_before(*arguments, **options):
        editing.forget(Classifier.open(folder, device="cpu"), ["apart-8"])
        return find(*arguments, **options)

    monkeypatch.setattr(command, "audit", forget_before)
    assert cli.main(["audit", str(folder)]) == 0
    assert all((folder / artefact.AUDIT / name).is_file() for name in MADE)


@pytest.mark.parametrize("late", ["write_page", "_audit"])
def test_an_audit_whose_model_is_replaced_under_way_is_not_left_in_the_other_ones_folder(
    model, tmp_path, monkeypatch, capsys, late
):
    """Its folder goes with the model; or, if that is early, it is made in the new one's."""
    other, run = write_model(tmp_path / "other", seed=5), getattr(command, late)

    def replace_first(*arguments, **options):
        assert cli.main(["export", str(other), "--to", str(model.folder), "--force"]) == 0
        return run(*arguments, **options)

    monkeypatch.setattr(command, late, replace_first)
    assert cli.main(["audit", str(model.folder)]) == 2
    told = capsys.readouterr()
    assert "another model took the place of this one while the audit was made" in told.err
    assert "look  " not in told.out
    assert not (model.folder / artefact.AUDIT).exists()


def test_a_page_on_images_that_are_forgotten_does_not_wait_for_the_map(model, monkeypatch):
    """A kill during the map, which takes minutes for many images, would leave it."""
    write, maps, audit = command.write_page, [], model.folder / artefact.AUDIT
    audit.mkdir()
    (audit / "relabel.csv").write_text("key,class\nimg-8,drop\n")  # so that the folder stays

    def forget_first(*arguments):
        editing.forget(Classifier.open(model.folder, device="cpu"), ["img-7"])
        write(*arguments)

    monkeypatch.setattr(command, "write_page", forget_first)
    monkeypatch.setattr(command, "_write_map", lambda *given: maps.append(given))
    assert cli.main(["audit", str(model.folder)]) == 2
    assert not maps
    assert [path.name for path in audit.iterdir()] == ["relabel.csv"]


def test_files_that_no_audit_has_written_stay(model):
    audit = model.folder / artefact.AUDIT
    audit.mkdir()
    for name in ("labels.parquet.tmp", "map.parquet.tmp", "relabel.csv.tmp", "mine.tmp"):
        (audit / name).write_text("img-7")
    editing.forget(model, ["img-7"])
    assert [path.name for path in audit.iterdir()] == ["mine.tmp"]


def test_a_copy_over_a_model_deletes_its_audit_if_that_may_show_what_was_forgotten_since(
    model, tmp_path
):
    copy, audit = tmp_path / "copy", tmp_path / "copy" / artefact.AUDIT
    model.save_pretrained(copy)
    assert cli.main(["audit", str(copy)]) == 0
    (audit / "labels.csv").write_text("key,class\nimg-7,class 2\nimg-8,drop\n")
    model.save_pretrained(copy)
    assert (audit / "index.html").is_file()  # nothing was forgotten
    editing.forget(model, ["img-7"])
    model.save_pretrained(copy)
    assert [path.name for path in audit.iterdir()] == ["labels.csv"]
    assert (audit / "labels.csv").read_text() == "key,class\nimg-8,drop\nimg-7,drop?\n"
    assert cli.main(["audit", str(copy)]) == 0
    model.save_pretrained(copy)
    assert (audit / "index.html").is_file()
    editing.forget(model, ["img-9"])
    (audit / "labels.csv").write_bytes(b"key,class\n\xff,drop\n")
    with pytest.raises(UserError, match=r"the audit here.*can't be deleted"):
        model.save_pretrained(copy)


def test_a_model_without_audit_forgets_without_making_one(model):
    editing.forget(model, ["img-7"])
    assert not (model.folder / artefact.AUDIT).exists()


def test_no_copy_has_the_audit(model, tmp_path):
    assert cli.main(["audit", str(model.folder), "--no-map"]) == 0
    assert cli.main(["export", str(model.folder), "--to", str(tmp_path / "copy")]) == 0
    Classifier.open(model.folder).save_pretrained(tmp_path / "saved")
    for copy in ("copy", "saved"):
        assert len(Classifier.open(tmp_path / copy, verify=True).memory) == 40
        assert not (tmp_path / copy / artefact.AUDIT).exists()
