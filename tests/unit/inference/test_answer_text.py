"""What text and pages say of an answer besides its classes: its path, its set, the images it was answered with."""

from __future__ import annotations

import json
import re
from html import unescape

import numpy as np
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.sets import relations
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
    classes = f"{found['classes']} class{'es' * (found['classes'] > 1)}"
    line = f"related: {'yes' if found['related'] else 'no'}; {classes} among 6 images"
    if option == "--same":  # what was said, not what was found
        line = "6 images taken as one class, as asked for by --same"
    line += "; each answer depends on the other images" * found["related"]
    assert found["related"] or option == "--together"
    text = predicted(calibrated.folder, images, capsys, option)
    assert text.splitlines()[0] == line
    assert text.count(line) == 1
    assert text.count("related: ") == (option == "--together")
    path = tmp_path / "a.html"
    assert line in predicted(calibrated.folder, images, capsys, option, "--out", str(path))
    assert path.read_text().count(f"<p>{line}</p>\n<article>") == 1
    printed = predicted(calibrated.folder, images, capsys, option, "--json")
    assert [json.loads(row)["together"] for row in printed.splitlines()] == [found] * 6
    predicted(calibrated.folder, images, capsys, "--out", str(path))
    assert "related: " not in path.read_text()


def surer(model):
    """The model with a temperature that is ten times lower."""
    path = model.folder / "calibration.json"
    tree = json.loads(path.read_text())
    for part in ("calibration", "together"):
        tree[part]["temperature"] /= 10
    path.write_text(json.dumps(tree))
    artefact.write_checksums(model.folder)
    return Classifier.open(model.folder, device="cpu")


def test_images_alone_that_contradict_that_they_show_one_class_are_said_to(
    calibrated, tmp_path, capsys
):
    """The surest images of two classes are no set of one; those of one class are."""
    shown, calibrated = pictures(200, seed=4), surer(calibrated)
    alone = calibrated.predict(list(shown))
    surest = sorted(range(200), key=lambda place: -alone[place].probability)
    by_class = {c: [n for n in surest if alone[n].label == f"class {c}"][:5] for c in (0, 1)}
    assert len(by_class[0]) == len(by_class[1]) == 5
    mixed = files(tmp_path / "mixed", shown[by_class[0] + by_class[1]])
    (found,) = {a.label for a in calibrated.predict_together(mixed, same=True)}
    other = [
        alone[n].probability
        for c, places in by_class.items()
        for n in places
        if f"class {c}" != found
    ]
    doubt = (
        f"alone, 5 of 10 images are of another class ({100 * np.mean(other):.1f} % sure on "
        "average); without --same each is answered alone"
    )
    path = tmp_path / "a.html"
    for option in ((), ("--json",), ("--out", str(path))):
        asked = ["predict", "--model", str(calibrated.folder), "--same", *option]
        assert cli.main([*asked, *map(str, mixed)]) == 0
        assert capsys.readouterr().err.count(f"note: {doubt}\n") == 1
    assert path.read_text().count(f"<p>{doubt}</p>\n<article>") == 1
    one = files(tmp_path / "one", shown[by_class[0]])
    for given, option in ((one, "--same"), (mixed, "--together")):
        asked = ["predict", "--model", str(calibrated.folder), option]
        assert cli.main([*asked, *map(str, given)]) == 0
        assert "alone, " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("alone", "elsewhere", "contradicted"),
    [
        ([0.99, 0.99, -0.99], 1, True),  # 0.03 wrong answers are expected
        ([0.99] * 29 + [-0.6], 1, False),  # 0.69 are
        ([0.6] * 5 + [-0.6] * 4, 4, False),  # 3.6 are: a difficult class
        ([0.95] * 21 + [-0.95] * 9, 9, True),  # 1.5 are
        ([0.95] * 9, 0, False),
        ([1.0], 0, False),
    ],
)
def test_when_images_alone_contradict_that_they_show_one_class(alone, elsewhere, contradicted):
    """``alone``: probabilities of the set's class, or negative of another."""
    rows = [[p, 1 - p] if p > 0 else [1 + p, -p] for p in alone]
    set_of_one = relations.Relations(
        np.tile([0.9, 0.1], (len(rows), 1)), len(rows) > 1, 1, 1.0, 0.0
    )
    said = relations.company(set_of_one, np.array(rows))
    assert (said["elsewhere"], said["contradicted"]) == (elsewhere, contradicted)
    assert said["same"]
    sure = [-p for p in alone if p < 0]
    assert said.get("elsewhere_probability") == (round(np.mean(sure), 4) if sure else None)
    assert "contradicted" not in relations.company(set_of_one, None)
