"""What text and pages say of an answer besides its classes: its path, its set, the images it was answered with."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.inference import editing
from tests.support.models import pictures, write_model
from tests.support.shards import encode_image
from tests.unit.inference.test_editing import of_new_class


@pytest.fixture
def images(tmp_path):
    """Files of known images, none of them in the memory."""
    return files(tmp_path / "known", pictures(6, seed=1))


def files(folder, images):
    folder.mkdir()
    for place, image in enumerate(images):
        (folder / f"{place}.png").write_bytes(encode_image(image))
    return sorted(folder.iterdir())


def predicted(folder, images, capsys, *options):
    assert cli.main(["predict", "--model", str(folder), *options, *map(str, images)]) == 0
    return capsys.readouterr().out


def articles(page):
    """Lines of text of each answer on a page."""
    found = re.findall(r"<article>(.*?)</article>", page, re.S)
    return [[unescape(line) for line in re.findall(r"<p>(.*?)</p>", one)] for one in found]


def test_the_path_of_a_new_class(calibrated, images, tmp_path, capsys):
    editing.add(calibrated, list(of_new_class(8)), "framed", old_loss=30.0)
    images += files(tmp_path / "new", of_new_class(8, seed=300))
    answers = calibrated.predict(images)
    paths = [answer.path for answer in answers]
    assert {"graph", "new class"} == set(paths)
    text = predicted(calibrated.folder, images, capsys)
    parts = re.split(r"^(?=\S)", text, flags=re.M)[1:]
    assert ["path: new class" in part for part in parts] == [path == "new class" for path in paths]
    assert text.count("path: ") == paths.count("new class")
    predicted(calibrated.folder, images, capsys, "--out", str(tmp_path / "a.html"))
    shown = articles((tmp_path / "a.html").read_text())
    assert shown == [[f"path: {path}"] for path in paths]


def test_the_path_without_a_graph(calibrated, images, tmp_path, capsys):
    """It is the only one of a model without a graph, and remarkable with an empty memory."""
    control = write_model(tmp_path / "control", "none")
    assert "path: " not in predicted(control, images, capsys)
    predicted(control, images, capsys, "--out", str(tmp_path / "a.html"))
    assert articles((tmp_path / "a.html").read_text()) == [["path: network"]] * 6
    memory = calibrated.memory
    editing.remove(calibrated, memory.keys(memory.live_ids))
    assert predicted(calibrated.folder, images, capsys).count("    path: network\n") == 6


@pytest.mark.parametrize("coverage", [0.5, 0.95])
def test_a_page_shows_the_sets_that_were_asked_for(calibrated, images, tmp_path, capsys, coverage):
    options = ["--coverage", str(coverage)]
    predicted(calibrated.folder, images, capsys, *options, "--out", str(tmp_path / "a.html"))
    sets = [a.scores["set"] for a in calibrated.predict(images, coverage=coverage)]
    expected = [["path: graph", f"set: {', '.join(one) or 'none'}"] for one in sets]
    assert articles((tmp_path / "a.html").read_text()) == expected
    text = predicted(calibrated.folder, images, capsys, *options)
    assert [line.partition("  set: ")[2] for line in text.splitlines() if line[0] != " "] == [
        ", ".join(one) or "none" for one in sets
    ]


@pytest.mark.parametrize("option", ["--together", "--same"])
def test_images_answered_together_say_whether_they_are_related(
    calibrated, images, tmp_path, capsys, option
):
    found = calibrated.predict_together(images, same=option == "--same")[0].scores["together"]
    line = (
        f"related: {'yes' if found['related'] else 'no'}; {found['classes']} classes among 6 images"
    )
    line += "; each answer depends on the other images" * found["related"]
    assert found["related"] or option == "--together"
    text = predicted(calibrated.folder, images, capsys, option)
    assert text.splitlines()[0] == line
    assert text.count("related: ") == 1
    path = tmp_path / "a.html"
    assert line in predicted(calibrated.folder, images, capsys, option, "--out", str(path))
    assert path.read_text().count(f"<p>{line}</p>\n<article>") == 1
    printed = predicted(calibrated.folder, images, capsys, option, "--json")
    assert [json.loads(row)["together"] for row in printed.splitlines()] == [found] * 6
    predicted(calibrated.folder, images, capsys, "--out", str(path))
    assert "related: " not in path.read_text()
