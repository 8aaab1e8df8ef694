"""An audit in a model's folder shows its images: a forgotten one leaves it, and no copy has one."""

import pyarrow.parquet as pq

from cnn2gnn_dist import cli
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact

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
