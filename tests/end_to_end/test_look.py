"""What users look at after a run, in complete runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from cnn2gnn_dist import cli
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.report.page import write_report
from tests.unit.pipeline.test_look import images  # noqa: F401 (fixtures)


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


def test_report_is_one_file_with_the_numbers_of_results_json(micro_run):
    text = (micro_run / "report.html").read_text()
    page = Page(text)
    assert page.sources
    kinds = ("data:image/png;base64,", "data:image/jpeg;base64,")  # charts, thumbnails
    assert all(source.startswith(kinds) for source in page.sources)
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


def test_the_model_of_a_run_is_exported_without_the_runs_records(micro_run, tmp_path):
    assert cli.main(["export", str(micro_run), "--to", str(tmp_path / "model")]) == 0
    made = {path.name for path in (micro_run / "model").iterdir()} - {"begin.json", "done.json"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == made
    listed = json.loads((micro_run / "model" / "checksums.json").read_text())["files"]
    assert set(listed) == made - {"checksums.json", "memory"}
    assert cli.main(["export", str(tmp_path / "model"), "--to", str(tmp_path / "again")]) == 0


def test_the_report_shows_the_audits_first_page(micro_run, tmp_path):
    out = tmp_path / "audit"
    assert cli.main(["audit", str(micro_run), "--out", str(out), "--no-map"]) == 0
    labels = pq.read_table(out / "labels.parquet").to_pylist()
    text = (micro_run / "report.html").read_text()
    cards = re.findall(r'class="card doubt">.*?<span class="wrong">(.*?)</span> → <b>(.*?)</b>.*?'
                       r'class="key">(.*?)</span>', text, re.DOTALL)  # fmt: skip
    assert cards == [(one["class"], one["suggested"], one["key"]) for one in labels[:10]]
    assert f"{len(labels):,} of " in text
    held = len(Manifest.load(micro_run / "manifest" / "test.arrow"))
    assert f" of {held:,} held-out images have an exact or near-duplicate" in text
    hubs = pq.read_table(out / "hubs.parquet").slice(0, 1).to_pylist()[0]
    assert f"{hubs['class']} · {hubs['in_degree']:,}<br>" in text


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
    assert "is unknown" in text


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


def test_a_moved_run_predicts_and_unreadable_images_are_named(micro_run, images, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.copytree(micro_run, moved)
    folder, _, _ = images
    (folder / "99.jpg").write_text("no image")
    names = [str(folder / name) for name in ("00.png", "99.jpg", "none.png")]
    assert cli.main(["predict", "--run", str(moved), *names]) == 1
    said = capsys.readouterr()
    assert "00.png" in said.out
    assert "99.jpg: not readable as an image: text" in said.err
    assert "none.png: there is no such file; check the path" in said.err
    assert "Traceback" not in said.err


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
    assert "1 .heic (not read; first: z.heic), 1 link to a folder that was already read" in said.err
    assert "nnn: not readable as an image: File name too long" in said.err
