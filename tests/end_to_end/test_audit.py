"""``cnn2gnn audit`` of a small complete run and of its model; decisions that a training reads."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cnn2gnn_dist import cli, settings
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.index.relabel import read_relabel
from cnn2gnn_dist.graph.version import latest_version, open_version
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.pipeline import runner
from cnn2gnn_dist.pipeline.runner import Status


@pytest.fixture(scope="module")
def audited(micro_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("audit") / "out"
    assert cli.main(["audit", str(micro_run), "--out", str(out), "--csv", "--top", "5"]) == 0
    return out


def keys_of(run: Path, part: str = "train") -> dict[str, int]:
    manifest = Manifest.load(run / "manifest" / f"{part}.arrow")
    return {manifest.key(row): int(manifest.label_N[row]) for row in range(len(manifest))}


def test_tables_say_what_the_run_says(micro_run, audited):
    keys, held = keys_of(micro_run), keys_of(micro_run, "test")
    version = open_version(latest_version(micro_run / "graph"))
    order = list(keys)
    labels = pq.read_table(audited / "labels.parquet").to_pylist()
    assert labels
    assert [one["score"] for one in labels] == sorted((o["score"] for o in labels), reverse=True)
    for one in labels:
        assert one["class"] == str(keys[one["key"]]) != one["suggested"]
        row = order.index(one["key"])
        candidates = {order[i] for i in version.candidates[row] if i >= 0}
        assert set(one["neighbours"]) <= candidates - {one["key"]}
        assert one["neighbour_classes"] == [str(keys[key]) for key in one["neighbours"]]
        assert 0 < sum(one["neighbour_weights"]) <= 1.001
    hubs = pq.read_table(audited / "hubs.parquet").to_pydict()
    degree = np.bincount(np.asarray(version.candidates).ravel(), minlength=len(order))
    assert dict(zip(hubs["key"], hubs["in_degree"], strict=True)) == dict(
        zip(order, degree.tolist(), strict=True)
    )
    far = pq.read_table(audited / "outliers.parquet").to_pydict()
    assert sorted(far["key"]) == sorted(order)
    assert far["distance"] == sorted(far["distance"], reverse=True)
    for pair in pq.read_table(audited / "duplicates.parquet").to_pylist():
        assert pair["key"] in (held if pair["set"] == "held-out" else keys)
        assert pair["other_key"] in keys
        assert pair["same_class"] == (pair["class"] == pair["other_class"])
    assert (audited / "labels.csv").read_text().startswith("key,class,suggested,score")
    assert not list(audited.glob("*.tmp"))


def test_the_map_has_a_row_an_image_with_its_picture_and_its_neighbours(micro_run, audited):
    table = pq.read_table(audited / "map.parquet")
    version = open_version(latest_version(micro_run / "graph"))
    assert table["key"].to_pylist() == list(keys_of(micro_run))
    np.testing.assert_array_equal(np.array(table["z"].to_pylist(), np.float32), version.z)
    for row, one in enumerate(table.select(["image", "neighbors"]).to_pylist()):
        assert one["image"]["bytes"][:2] == b"\xff\xd8"
        near = one["neighbors"]
        assert len(near["ids"]) == len(near["distances"]) == version.candidates.shape[1]
        there = [i for i in near["ids"] if i >= 0]
        assert set(there) == set(version.candidates[row][version.candidates[row] >= 0])
        far = np.linalg.norm(np.asarray(version.z)[there] - version.z[row], axis=1)
        np.testing.assert_allclose(near["distances"][: len(there)], far, atol=1e-3)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.nameless = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        self.nameless += tag == "img" and not found.get("alt")
        self.nameless += tag == "input" and not found.get("aria-label")


def test_the_page_needs_no_network_and_names_its_pictures(audited):
    text = (audited / "index.html").read_text()
    page = Page(text)
    pictures = [one for one in page.addresses if not one.startswith("#")]
    assert pictures
    assert all(one.startswith("data:image/jpeg;base64,") for one in pictures)
    assert page.nameless == 0
    assert not re.findall(r"https?://|@import|url\(", text)
    doubtful = len(pq.read_table(audited / "labels.parquet"))
    assert doubtful
    assert text.count('<div class="card">') == min(5, doubtful)


def test_a_model_is_audited_as_its_run(micro_run, audited, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["audit", str(micro_run / "model"), "--out", str(out), "--no-map"]) == 0
    assert not (out / "map.parquet").exists()
    mine, runs = (pq.read_table(folder / "labels.parquet") for folder in (out, audited))
    assert mine["key"].to_pylist() == runs["key"].to_pylist()
    np.testing.assert_allclose(mine["score"], runs["score"], atol=1e-3)
    assert "leakage" not in capsys.readouterr().out


def test_copies_among_held_out_images_are_leakage(micro_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(micro_run, copy)
    train = Manifest.load(copy / "manifest" / "train.arrow")
    # Half of the "held-out" images are training images: the same bytes, at the same positions.
    train.select(np.arange(0, len(train), 2)).save(copy / "manifest" / "test.arrow")
    out = tmp_path / "out"
    assert cli.main(["audit", str(copy), "--out", str(out), "--no-map", "--top", "3"]) == 0
    pairs = pq.read_table(out / "duplicates.parquet").to_pylist()
    exact = [pair for pair in pairs if (pair["kind"], pair["set"]) == ("exact", "held-out")]
    assert len({pair["key"] for pair in exact}) == -(-len(train) // 2)
    assert all(pair["key"] == pair["other_key"] for pair in exact)
    assert pairs[: len(exact)] == exact


def test_decisions_become_a_list_that_a_training_reads(micro_run, tmp_path, capsys):
    keys = keys_of(micro_run)
    some = list(keys)[:4]
    new = str((keys[some[0]] + 1) % 10)
    (tmp_path / "labels.csv").write_text(f"key,class\n{some[0]},{new}\n{some[1]},drop\n")
    fix = ["audit", str(micro_run), "--out", str(tmp_path / "out")]
    fix += ["--fix", str(tmp_path / "labels.csv")]
    assert cli.main([*fix, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert cli.main(fix) == 0
    listed = tmp_path / "out" / "relabel.csv"
    assert f"data.relabel={listed}" in capsys.readouterr().out
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    given = ["--config", str(run / "config.yaml"), f"run.dir={run}", f"data.relabel={listed}"]
    steps = {s.stage.name: s.status for s in runner.plan(settings.load(given[1], given[2:]))}
    assert steps["pack"] is Status.COMPLETE
    assert steps["index"] is Status.STALE
    assert cli.main(["index", *given, "--update"]) == 0
    assert keys_of(run) == {
        key: int(new) if key == some[0] else label for key, label in keys.items() if key != some[1]
    }
    assert keys_of(run, "test") == keys_of(micro_run, "test")
    capsys.readouterr()
    assert cli.main(["audit", str(run), "--no-map"]) == 2
    assert "`cnn2gnn run --update`" in capsys.readouterr().err


def test_earlier_decisions_stay_in_the_list(micro_run, tmp_path):
    some = list(keys_of(micro_run))[:3]
    run, earlier = tmp_path / "run", tmp_path / "earlier.csv"
    shutil.copytree(micro_run, run)
    earlier.write_text(f"key,class\ngone,drop\n{some[0]},1\n{some[1]},2\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["relabel"] = str(earlier)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "labels.csv").write_text(f"key,class\n{some[1]},drop\n{some[2]},3\n")
    assert cli.main(["audit", str(run), "--fix", str(tmp_path / "labels.csv")]) == 0
    listed = read_relabel(run / "audit" / "relabel.csv")
    assert {key: one.name for key, one in listed.items()} == {
        "gone": None, some[0]: "1", some[1]: None, some[2]: "3",
    }  # fmt: skip


def test_edits_of_the_runs_model_are_in_the_list(micro_run, tmp_path):
    keys = keys_of(micro_run)
    run, (first, second, third) = tmp_path / "run", list(keys)[:3]
    shutil.copytree(micro_run, run)
    other = str((keys[first] + 1) % 10)
    model = str(run / "model")
    assert cli.main(["memory", "relabel", model, first, "--class", other]) == 0
    assert cli.main(["memory", "remove", model, second]) == 0
    (tmp_path / "labels.csv").write_text(f"key,class\n{third},drop\n")
    for place in (run, run / "model"):
        assert cli.main(["audit", str(place), "--fix", str(tmp_path / "labels.csv")]) == 0
        listed = read_relabel(place / "audit" / "relabel.csv")
        assert {key: one.text for key, one in listed.items()} == {
            first: other, second: "drop?", third: "drop",
        }  # fmt: skip


def test_decisions_of_the_training_are_in_the_list_of_its_model(micro_run, tmp_path, capsys):
    run, apart = tmp_path / "run", tmp_path / "apart"
    shutil.copytree(micro_run, run)
    shutil.rmtree(run / "model")  # the export makes one of the run's graph
    first, second, third, fourth = list(keys_of(micro_run))[:4]
    train = Manifest.load(run / "manifest" / "train.arrow")
    shard = Path(train.shards[int(train.shard_N[0])].path).stem
    # As the stage index leaves it; it has applied the list before.
    (run / "manifest" / "relabel.csv").write_text(
        f"key,class\n{shard}/{first},1\n{second},2\n{third},3\ngone,drop\n"
    )
    assert cli.main(["export", str(run), "--to", str(apart)]) == 0
    assert cli.main(["memory", "forget", str(apart), third]) == 0
    (tmp_path / "labels.csv").write_text(f"key,class\n{first},5\n{fourth},drop\n")
    capsys.readouterr()
    assert cli.main(["audit", str(apart), "--fix", str(tmp_path / "labels.csv")]) == 0
    told = capsys.readouterr()
    assert "with 2 earlier decisions" in told.out
    assert "does not say" not in told.err
    listed = read_relabel(apart / "audit" / "relabel.csv")
    assert {key: (one.name, one.required) for key, one in listed.items()} == {
        second: ("2", True), "gone": (None, True), first: ("5", True), fourth: (None, True),
        third: (None, False),
    }  # fmt: skip
    # The same from the run, whose config names no list any more.
    assert cli.main(["audit", str(run), "--fix", str(tmp_path / "labels.csv")]) == 0
    listed = read_relabel(run / "audit" / "relabel.csv")
    assert {key: one.name for key, one in listed.items()} == {
        second: "2", third: "3", "gone": None, first: "5", fourth: None,
    }  # fmt: skip
    config = json.loads((apart / "config.json").read_text())  # of an earlier version
    del config["source"]["relabelled"]
    (apart / "config.json").write_text(json.dumps(config))
    artefact.write_checksums(apart)
    capsys.readouterr()
    assert cli.main(["audit", str(apart), "--fix", str(tmp_path / "labels.csv")]) == 0
    assert "does not say whether its run was trained with a relabel list" in capsys.readouterr().err


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_forgotten_stays_left_out_whatever_is_decided(micro_run, tmp_path, capsys, killed):
    """Also where ``run --update`` was killed after it had set the model aside."""
    run, (first, second, third) = tmp_path / "run", list(keys_of(micro_run))[:3]
    shutil.copytree(micro_run, run)
    assert cli.main(["memory", "forget", str(run / "model"), first, second]) == 0
    if killed:
        (run / "model").rename(run / "model.old-1")
    train = Manifest.load(run / "manifest" / "train.arrow")
    shard = Path(train.shards[int(train.shard_N[0])].path).stem
    (tmp_path / "labels.csv").write_text(f"key,class\n{shard}/{first},1\n{third},2\n")
    capsys.readouterr()
    assert cli.main(["audit", str(run), "--fix", str(tmp_path / "labels.csv")]) == 0
    assert (
        f"decisions that do not count (1), since these images were forgotten and stay left out: {shard}/{first}"
        in (capsys.readouterr().err)
    )
    listed = read_relabel(run / "audit" / "relabel.csv")
    assert {key: one.name for key, one in listed.items()} == {
        third: "2", first: None, second: None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["NOWHERE"], "there is no such folder"),
        (["RUN", "--top", "-1"], "use --top 0 or more"),
        (["RUN", "--fix", "NOWHERE"], "can't be read: No such file"),
        (["RUN", "--fix", "key,class\nzz,1\n"], "'zz': no training image has this key"),
        (["RUN", "--fix", "key,class\nHELD,1\n"], "held out"),
        (["RUN", "--fix", "key,class\nKEY,cat\n"], "'cat': not a class"),
        (["RUN", "--fix", "key,class\nKEY,\n"], "no decisions"),
        (["RUN", "--fix", "key,class\nKEY,1\nSHARD/KEY,2\n"], "are one image"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(
    micro_run, tmp_path, capsys, arguments, words
):
    train = Manifest.load(micro_run / "manifest" / "train.arrow")
    names = {
        "RUN": str(micro_run),
        "SHARD": Path(train.shards[int(train.shard_N[0])].path).stem,
        "NOWHERE": str(tmp_path / "nowhere"),
        "KEY": next(iter(keys_of(micro_run))),
        "HELD": next(iter(keys_of(micro_run, "test"))),
    }
    given = []
    for one in arguments:
        for name, value in names.items():
            one = one.replace(name, value)
        if "\n" in one:
            (tmp_path / "labels.csv").write_text(one)
            one = str(tmp_path / "labels.csv")
        given.append(one)
    out = tmp_path / "out"
    assert cli.main(["audit", *given, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not out.exists()


def test_a_run_without_a_graph_is_refused(micro_run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(micro_run, copy)
    done = copy / "student" / "done.json"
    record = json.loads(done.read_text())
    record["parts"]["graph.scope"] = "batch"
    done.write_text(json.dumps(record))
    assert cli.main(["audit", str(copy)]) == 2
    assert "graph.scope=dataset" in capsys.readouterr().err
