"""What users look at after a run: the report, predictions, the doctor."""

from __future__ import annotations

import os

import numpy as np
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.answers import predict
from cnn2gnn_dist.commands.doctor import machine as doctor
from cnn2gnn_dist.data.images import image_files
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.report.page import table_rows, verdict
from tests.support.models import write_model
from tests.support.shards import encode_image


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
    assert "the graph helps" in verdict(results(0.80, 0.70, 1000))
    assert "hurts" in verdict(results(0.70, 0.80, 1000))
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


def test_predict_answers_for_a_pipe_without_a_writer_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_files, "WRITER_S", 0.1)
    pipe, image = tmp_path / "pipe.png", tmp_path / "1.png"
    os.mkfifo(pipe)
    image.write_bytes(encode_image(np.zeros((16, 16, 3), np.uint8)))
    model = write_model(tmp_path / "m")
    assert predict.command(model, [str(pipe), str(image)], top=1, as_json=False) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"{image}  class ")
    assert said.err == (
        f"cnn2gnn: {pipe}: not readable as an image: nothing is writing to the pipe (waited 0.1 seconds)\n"
    )


def test_predict_wants_a_finished_run(tmp_path, capsys):
    assert cli.main(["predict", "--run", str(tmp_path), "x.png"]) == 2
    assert "not a model or a finished run" in capsys.readouterr().err


def test_doctor_names_what_is_missing_and_the_remedy(monkeypatch, capsys):
    def broken():
        raise ImportError("no such thing")

    assert doctor.command() == 0, capsys.readouterr().out
    monkeypatch.setattr(doctor, "_dgl", broken)
    assert doctor.command() == 1
    said = capsys.readouterr().out
    assert "FAIL  dgl imports" in said
    assert "-> pip install dgl" in said
