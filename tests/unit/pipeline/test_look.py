"""What people look at after a run: the report, predictions, the doctor."""

from __future__ import annotations

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands import doctor, predict
from cnn2gnn_dist.data.images import image_files
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.report.page import table_rows, verdict, write_report
from tests.support.shards import encode_image


class Page(HTMLParser):
    """Links, image sources and table cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.missing_alt = 0
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self._in_cell = tag == "td"
        if "src" in found:
            self.sources.append(found["src"])
        if "href" in found:
            self.links.append(found["href"])
        if tag == "img" and not found.get("alt"):
            self.missing_alt += 1

    def handle_data(self, data):
        if self._in_cell:
            self.cells.append(data.strip())


@pytest.mark.slow
def test_report_is_one_file_with_the_numbers_of_results_json(micro_run):
    text = (micro_run / "report.html").read_text()
    page = Page(text)
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.links == []
    assert page.missing_alt == 0
    table = json.loads((micro_run / "results.json").read_text())
    for model in ("teacher", "student", "control_mlp"):
        assert f"{table[model]['accuracy']:.2%}" in page.cells
        assert f"{table[model]['parameters']:,}" in page.cells
    for count in table["student"]["graph"]["inner"] + table["student"]["graph"]["halo"]:
        assert f"{count:,}" in page.cells
    assert (micro_run / "evaluation" / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert text.count('class="card"') == 6


@pytest.mark.slow
def test_report_leaves_out_what_a_run_does_not_have(micro_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(micro_run, copy)
    (copy / "evaluation" / "gallery.npz").unlink()
    shutil.rmtree(copy / "control")
    table = json.loads((copy / "results.json").read_text())
    del table["control_mlp"], table["student"]["graph"]
    (copy / "results.json").write_text(json.dumps(table))
    text = write_report(copy, [str(n) for n in range(10)]).read_text()
    assert "The learned graph" not in text
    assert 'class="card"' not in text
    assert "not known" in text


def results(student: float, control: float, images: int) -> dict:
    row = {
        "balanced_accuracy": 0.5,
        "ece": 0.1,
        "parameters": 10,
        "flops": 1e6,
        "ms_per_image": 1.0,
    }
    return {
        "student": {**row, "accuracy": student},
        "control_mlp": {**row, "accuracy": control, "parameters": 9},
        "run": {"test_images": images},
    }


def test_verdict_says_tie_gain_or_loss():
    assert "a tie" in verdict(results(0.80, 0.79, 1000))
    assert "the graph pays" in verdict(results(0.80, 0.70, 1000))
    assert "costs accuracy" in verdict(results(0.70, 0.80, 1000))
    assert "+10.00 points, standard error 1.92" in verdict(results(0.80, 0.70, 1000))


def test_the_best_of_each_column_is_marked():
    student, control = table_rows(results(0.8, 0.7, 100))
    assert student["cells"][0] == ("80.00%", True)
    assert control["cells"][0] == ("70.00%", False)
    assert control["cells"][3] == ("9", True)


@pytest.fixture
def images(micro_run, tmp_path):
    manifest = Manifest.load(micro_run / "manifest" / "test.arrow")
    reader = Reader(ReaderSpec(str(micro_run / "manifest" / "test.arrow"), ViewSpec("none", 16)))
    batch = reader.read(Request(np.arange(40), CLEAN))
    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(batch.images):
        (folder / f"{number:02d}.png").write_bytes(encode_image(pixels))
    return folder, batch.labels, manifest.classes


@pytest.mark.slow
def test_predictions_are_those_of_the_evaluation(micro_run, images, capsys):
    folder, labels, classes = images
    assert cli.main(["predict", "--run", str(micro_run), "--json", str(folder)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    saved = np.load(micro_run / "evaluation" / "student.npz")
    assert [one["classes"][0]["class"] for one in said] == [
        classes[c] for c in saved["predicted"][:40]
    ]
    np.testing.assert_array_equal(saved["labels"][:40], labels)
    train = Manifest.load(micro_run / "manifest" / "train.arrow")
    keys = {train.key(row) for row in range(len(train))}
    for one in said:
        weights = [near["weight"] for near in one["neighbours"]]
        assert weights == sorted(weights, reverse=True)
        assert 0 < sum(weights) <= 1.001
        assert {near["key"] for near in one["neighbours"]} <= keys


@pytest.mark.slow
def test_a_moved_run_predicts_and_unreadable_images_are_named(micro_run, images, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.copytree(micro_run, moved)
    folder, _, _ = images
    (folder / "99.jpg").write_text("no image")
    assert (
        cli.main(["predict", "--run", str(moved), str(folder / "00.png"), str(folder / "99.jpg")])
        == 1
    )
    said = capsys.readouterr()
    assert "00.png" in said.out
    assert "99.jpg: not readable as an image: text" in said.err
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_a_folder_is_searched_as_pack_does_and_sixteen_bits_are_answered_as_eight(
    micro_run, images, tmp_path, capsys
):
    folder, _, _ = images
    odd = tmp_path / "odd"
    (odd / "more").mkdir(parents=True)
    grey = np.asarray(Image.open(folder / "03.png").convert("L"))
    Image.fromarray(grey).save(odd / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(odd / "more" / "16.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(odd / "32", "TIFF")
    Path(os.fsdecode(os.fsencode(odd) + b"/caf\xe9.png")).write_bytes((odd / "8.png").read_bytes())
    (odd / "linked").symlink_to(odd / "more")
    (odd / "z.heic").write_bytes(bytes(50))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.jfif").write_bytes((odd / "8.png").read_bytes())
    (odd / "far").symlink_to(tmp_path / "elsewhere")
    command = ["predict", "--run", str(micro_run), "--json", str(odd), "n" * 300]
    assert cli.main(command) == 1
    said = capsys.readouterr()
    answers = [json.loads(line) for line in said.out.splitlines()]
    names = ["32", "8.png", "caf\\xe9.png", "far/far.jfif", "more/16.tif"]
    assert [answer["image"] for answer in answers] == [f"{odd}/{name}" for name in names]
    assert all(answer["classes"] == answers[0]["classes"] for answer in answers)
    assert "1 .heic (not read; first: z.heic), 1 link to a folder that is read" in said.err
    assert "nnn: not readable as an image: File name too long" in said.err


def test_predict_answers_for_a_pipe_without_a_writer_and_goes_on(tmp_path, monkeypatch, capsys):
    """Without a run: whatever model it is, the files are read alike."""

    class Anything:
        def __init__(self, run):
            graph = SimpleNamespace(scope="dataset")
            self.context = SimpleNamespace(
                views=lambda: ViewSpec("none", 16), config=SimpleNamespace(graph=graph)
            )

        def __call__(self, images, top):
            return [{"classes": [{"class": "a", "probability": 1.0}]} for _ in images]

    monkeypatch.setattr(predict, "Predictor", Anything)
    monkeypatch.setattr(image_files, "WRITER_S", 0.1)
    pipe, image = tmp_path / "pipe.png", tmp_path / "1.png"
    os.mkfifo(pipe)
    image.write_bytes(encode_image(np.zeros((16, 16, 3), np.uint8)))
    assert predict.command(tmp_path, [str(pipe), str(image)], top=1, as_json=False) == 1
    said = capsys.readouterr()
    assert said.out == f"{image}  a 100.0%\n"
    assert said.err == (
        f"cnn2gnn: {pipe}: not readable as an image: a pipe that nobody writes to (waited 0.1 seconds)\n"
    )


def test_predict_wants_a_finished_run(tmp_path, capsys):
    assert cli.main(["predict", "--run", str(tmp_path), "x.png"]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_doctor_names_what_is_missing_and_the_remedy(monkeypatch, capsys):
    def broken():
        raise ImportError("no such thing")

    assert doctor.command() == 0, capsys.readouterr().out
    monkeypatch.setattr(doctor, "_dgl", broken)
    assert doctor.command() == 1
    said = capsys.readouterr().out
    assert "FAIL  dgl imports" in said
    assert "-> pip install dgl" in said
