"""The report of small synthetic runs: its numbers, its pictures, and what may be missing."""

from __future__ import annotations

import base64
import io
import json
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from cnn2gnn_dist import settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.report import page as report
from cnn2gnn_dist.report.page import add_audit, confused_pairs, verdict, write_report
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.audit_digest import digest
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from tests.support.models import write_model
from tests.support.run_pages import MODELS, Page, make_run, scores


@pytest.fixture
def made(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch):
    """Skip drawing, for pages of which only the text matters: drawing takes most of their time."""

    def closed(figure):
        plt.close(figure)
        return b""

    monkeypatch.setattr("cnn2gnn_dist.report.figures._png", closed)


def page_of(root: Path, names: list[str] | None = None) -> tuple[Page, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what matplotlib warns about shows in the picture
        text = write_report(root, names).read_text()
    return Page(text), text


def change(root: Path, **models: dict) -> None:
    table = json.loads((root / "results.json").read_text())
    for name, values in models.items():
        table[name] |= values
    (root / "results.json").write_text(json.dumps(table))


def test_the_table_is_results_json(made, undrawn):
    page, text = page_of(made)
    table = json.loads((made / "results.json").read_text())
    _, *rows = page.table("accuracy")
    assert len(rows) == 5
    for row, name in zip(rows, MODELS, strict=True):
        r = table[name]
        assert row[1:] == [
            f"{r['accuracy']:.2%}", f"{r['balanced_accuracy']:.2%}", f"{r['ece']:.3f}",
            f"{r['parameters']:,}", f"{r['flops'] / 1e6:.2f}", f"{r['ms_per_image']:.3f}",
            f"{r['ms_alone']:.3f}" if name != "vote" else "",
        ]  # fmt: skip
    # All are equally well calibrated, so all are the best in that column.
    assert page.bold == ["90.00%", "89.00%", *["0.050"] * 5, "5,000", "5.00", "0.050", "0.200"]
    assert "made &lt;up&gt;" in text
    assert "1,234 training and 200 held-out images of 4 classes; 2 ranks on cpu; seed 0" in text


def test_one_file_that_points_nowhere(made):
    page, text = page_of(made)
    assert page.pointers
    assert all(pointer.startswith("data:image/png;base64,") for pointer in page.pointers)
    assert "http" not in text
    assert "url(" not in text
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert all(image.get("alt") for image in page.images)
    for image in page.images:
        Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).verify()
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "name: made" in text[text.index("<details>") :]


def test_curves_speed_and_graph(made, undrawn):
    page, _ = page_of(made)
    shown = [image["alt"] for image in page.images]
    for what in ("training loss", "training accuracy", "images per second", "waiting for data"):
        assert any(what in alt for alt in shown), what
    speed = ["teacher", "100", "25.0%", "508 MiB", "rank 1 on node-b, 1.50 ×"]
    assert page.table("images / s (median)")[1] == speed
    assert page.table("nodes")[1] == ["1,234", "16", "87.5%", "1.23%", "0 / 14 / 51"]
    assert page.table("partition")[1:] == [["0", "617", "31"], ["1", "617", "45"]]
    assert "Histogram of in-degrees" in shown


def test_the_gallery_marks_right_and_wrong_and_leaves_out_weightless_neighbours(made, undrawn):
    page, text = page_of(made, ["ant", "bee", "cat", "dog"])
    assert text.count('class="card"') == 3
    assert text.count("✓") == 2
    assert text.count("✗") == 1
    assert "✗ dog 40%" in text
    near = [image["alt"] for image in page.images if image["alt"].startswith("neighbor")]
    assert near == [f"neighbor, {name}" for name in ("ant", "bee", "dog", "dog", "cat")]


@pytest.mark.parametrize(
    ("student", "control", "said"),
    [
        (0.90, 0.80, ("beats its control", "+10.00 points", "standard error 3.54", "graph helps")),
        (0.80, 0.90, ("does not beat", "-10.00 points", "standard error 3.54", "hurts")),
        (0.90, 0.89, ("does not beat", "+1.00 points", "a tie")),
        (1.00, 1.00, ("does not beat", "+0.00 points", "standard error 0.00", "a tie")),
        (0.00, 0.00, ("does not beat", "a tie")),
    ],
)
def test_the_verdict_is_plain(made, student, control, said, undrawn):
    change(made, student={"accuracy": student}, control_mlp={"accuracy": control})
    for name in MODELS:  # without the predictions the standard error is an upper bound
        (made / "evaluation" / f"{name}.npz").unlink()
    sentence = verdict(json.loads((made / "results.json").read_text()))
    assert all(part in sentence for part in said), sentence
    assert sentence in page_of(made)[1]


def test_the_error_is_of_the_images_that_were_evaluated():
    table = {"student": scores(0.9, 1), "control_mlp": scores(0.8, 1), "run": {"test_images": 400}}
    assert "standard error 2.50" in verdict(table)
    table["student"]["evaluated"] = 100
    assert "standard error 5.00 (binomial, 100 images" in verdict(table)


def test_with_the_answers_at_hand_errors_are_those_of_paired_differences(made, undrawn):
    """The student corrects 12 errors of the self path and introduces 4, of 200 images."""
    labels = np.zeros(200, int)
    wrong = {
        "student": np.r_[0:4, 20:40],
        "self_path": np.r_[4:16, 20:40],
        "control_mlp": np.r_[0:8],
    }
    for name, places in wrong.items():
        path = made / "evaluation" / f"{name}.npz"
        predicted = labels.copy()
        predicted[places] = 1
        np.savez(path, **{**dict(np.load(path)), "labels": labels, "predicted": predicted})
        change(made, **{name: {"accuracy": 1 - len(places) / 200}})
    text = page_of(made)[1]
    # By hand: (12 + 4) / 200 - (8 / 200)² = 0.0784, over 200 images: 0.0198.
    assert (
        "self path, the same weights without neighbors: +4.00 points, standard error 1.98" in text
    )
    assert "(paired, 200 images): beyond two standard errors" in text
    # Against the control 4 corrected, 20 introduced: 24 / 200 - (16 / 200)² = 0.1136, 0.0238.
    assert "-8.00 points, standard error 2.38 (paired, 200 images, one seed)" in text


def test_images_that_are_left_out_are_reported(made, undrawn):
    assert "count as neither right nor wrong" not in page_of(made)[1]
    change(
        made, student={"evaluated": 190, "left_out": 10}, run={"left_out": ["a.tar: k7: <html>"]}
    )
    text = page_of(made)[1]
    assert "190 of 200 held-out images were evaluated. 10 can&#39;t be read" in text
    assert "a.tar: k7: &lt;html&gt;" in text


@pytest.mark.parametrize(
    ("lost", "gone"),
    [
        ("evaluation/gallery.npz", "Test images and the neighbors"),
        ("evaluation/student.npz", "Confusion matrix"),
        ("config.yaml", "<details>"),
        ("teacher/metrics.jsonl", "<td>teacher</td><td>100"),
    ],
)
def test_a_missing_file_leaves_its_part_out(made, lost, gone, undrawn):
    assert gone in page_of(made)[1]
    (made / lost).unlink()
    page, text = page_of(made)
    assert gone not in text
    assert len(page.table("accuracy")) == 6


def test_a_run_without_graph_control_and_metrics(made, undrawn):
    table = json.loads((made / "results.json").read_text())
    del table["student"]["graph"], table["control_mlp"]
    (made / "results.json").write_text(json.dumps(table))
    for stage in ("teacher", "student", "control"):
        (made / stage / "metrics.jsonl").unlink()
    page, text = page_of(made)
    assert len(page.table("accuracy")) == 5
    assert "unknown" in text
    for gone in ("The learned graph", "<h2>Training"):
        assert gone not in text


def test_a_training_that_is_not_in_the_results_is_not_shown(made, undrawn):
    """With student.control=false, say, an earlier config's control is still in the folder."""
    table = json.loads((made / "results.json").read_text())
    del table["control_mlp"], table["teacher"]
    (made / "results.json").write_text(json.dumps(table))
    speeds = page_of(made)[0].table("images / s (median)")
    assert [row[0] for row in speeds[1:]] == ["student"]


def test_values_that_were_not_finite_are_passed_over(made, undrawn):
    path = made / "teacher" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0] |= {"loss": None, "images_per_s": None}
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 9, "ep')
    assert page_of(made)[0].table("images / s (median)")[1][:2] == ["teacher", "100"]


def test_missing_results_are_the_users_error(tmp_path):
    with pytest.raises(UserError, match="no results") as caught:
        write_report(tmp_path)
    assert "evaluate" in caught.value.remedy


@pytest.mark.parametrize(
    "classes", [2, *(pytest.param(n, marks=pytest.mark.thorough) for n in (31, 1000))]
)
def test_confusion_is_a_picture_up_to_1000_classes(tmp_path, monkeypatch, classes):
    shown = []
    draw = report.figures.confusion
    monkeypatch.setattr(
        report.figures,
        "confusion",
        lambda matrix, names: shown.append(matrix) or draw(matrix, names),
    )
    root = make_run(tmp_path / "run", classes)
    (root / "evaluation" / "gallery.npz").unlink()
    page_of(root, [f"$class_{i}" for i in range(classes)])  # dollar signs are not formulas
    saved = np.load(root / "evaluation" / "student.npz")
    expected = np.zeros((classes, classes), int)
    np.add.at(expected, (saved["labels"], saved["predicted"]), 1)
    np.testing.assert_array_equal(shown[0], expected)
    with Image.open(root / "evaluation" / "confusion.png") as picture:
        assert min(picture.size) > 300
        assert max(picture.size) < 1500 or classes == 31
    if classes > 100:  # no names: a text for each would take gigabytes
        assert (root / "evaluation" / "confusion.png").stat().st_size < 1 << 20


def test_many_classes_give_a_table_of_pairs(tmp_path, undrawn):
    root = make_run(tmp_path / "run", 20_000)
    page, text = page_of(root)
    assert "Confusion matrix" not in text
    assert not (root / "evaluation" / "confusion.png").exists()
    assert 20 < len(page.table("true class")) <= 31


def test_pairs_are_counted_most_first():
    labels, predicted = np.array([0, 0, 0, 2, 2, 1]), np.array([1, 1, 0, 0, 2, 1])
    pairs = confused_pairs({"labels": labels, "predicted": predicted}, ["ant", "bee", "cat"])
    assert pairs == [("ant", "bee", 2), ("cat", "ant", 1)]


def test_classes_without_names_are_numbers(made, undrawn):
    assert "✗ 3 40%" in page_of(made, ["ant", "bee"])[1]


AUDIT = {
    "images": 1200, "doubtful": 1, "agree": 1, "held": 40, "across": 3, "leaked": 2, "within": 5,
    "labels": [{
        "key": "<b>", "image": None, "class": "cat", "suggested": "dog", "head": 0.1, "vote": 0.2,
        "near": [{"key": "k", "image": None, "class": "dog", "weight": 0.5, "same": False}],
    }],
    "outliers": [{"key": "far", "image": None, "class": "cat"}],
    "hubs": [{"key": "hub", "image": None, "class": "dog", "degree": 1234}],
    "bleeding": ("cat", "dog", 0.25),
}  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_the_audits_first_page_is_in_the_report_where_there_is_one(made):
    assert "first page" not in write_report(made).read_text()
    text = write_report(made, None, AUDIT).read_text()
    assert "1 of 1,200 labels fit another class better" in text
    assert "2 of 40 held-out images have" in text
    assert "dog · 1,234" in text
    assert "<b></span>" not in text  # keys are text
    nothing = {"labels": [], "outliers": [], "hubs": [], "bleeding": None, "held": 0}
    text = write_report(made, None, AUDIT | nothing).read_text()
    assert "held-out images have" not in text
    assert "Most likely label errors" not in text


@pytest.mark.parametrize("there", ["nothing", "without one", "with another"])
def test_an_audit_put_into_a_report_makes_the_page_that_is_written_with_it(made, there):
    names, path = ["ant", "bee", "cat"], made / "report.html"
    wanted = write_report(made, names, AUDIT).read_text()
    if there == "nothing":
        path.unlink()
    else:
        write_report(made, names, None if there == "without one" else AUDIT | {"hubs": []})
        assert path.read_text() != wanted
    assert add_audit(made, names, AUDIT) == path
    assert path.read_text() == wanted


def test_without_a_memory_the_reason_is_given(tmp_path):
    folder = write_model(tmp_path / "model", "none")
    config = settings.load("demo", [f"run.dir={tmp_path}"])
    context = Context(config, Ranks(), RunPaths(tmp_path), folder, "", "cpu", False)
    assert digest(context) == "the model has no memory of the training images"
