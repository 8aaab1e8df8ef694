"""User errors: a message that says what, where and remedy; exit code 2; no traceback."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn2gnn_dist import cli, settings
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.reader import Batch
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.pipeline import runner
from cnn2gnn_dist.stages.shared import preflight
from cnn2gnn_dist.stages.shared.context import CorruptCount
from cnn2gnn_dist.stages.shared.scheduled_values import rate_at
from tests.support.shards import encode_image, make_shards, random_images


@pytest.fixture
def shards(tmp_path):
    images = random_images(64, 16, 16)
    labels = np.arange(64) % 4
    return make_shards(tmp_path / "shards", images, labels, shard_size=16)


@pytest.mark.parametrize(
    ("override", "where", "remedy"),
    [
        ("student.epoch=3", "student.epoch", "student.epochs"),
        ("epochs=3", "epochs", "epochs"),
        ("student.epochs=many", "student.epochs", "cnn2gnn config"),
        ("student.epochs=0", "student.epochs", "cnn2gnn config"),
        ("graph.neighbours=20", "graph.neighbours", "graph.neighbours=9"),
        ("device=gpu", "device", "cnn2gnn config"),
        ("student=3", "student", "cnn2gnn config"),
        ("student.epochs", "student.epochs", "student.epochs=20"),
    ],
)
def test_config_mistakes_name_the_field_and_the_nearest(override, where, remedy, capsys):
    assert cli.main(["run", "--config", "demo", override, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert where in said.split("where:")[1].split("remedy:")[0]
    assert remedy in said.split("remedy:")[1]


def test_unknown_config_names_the_presets(capsys):
    assert cli.main(["run", "--config", "cifar"]) == 2
    assert "cifar10" in capsys.readouterr().err


def test_broken_yaml(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("student: {epochs: 3")
    assert cli.main(["run", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_asked_for_where_there_is_none():
    with pytest.raises(UserError, match="GPU") as caught:
        runner.choose_device("cuda")
    assert caught.value.where == "device"


def test_corrupt_samples_count_once_however_often_they_are_read():
    count = CorruptCount(limit=0.02, total=100)
    batch = Batch(
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros(2, np.int64),
        np.array([7, 8]),
        np.array([False, True]),
        ["a.tar: k7: truncated"],
    )
    for _ in range(5):
        count.note(batch)
    assert count.check() == {7: "a.tar: k7: truncated"}
    count.seen.update({1: "b", 2: "c"})
    with pytest.raises(UserError, match="3 corrupt images among 100"):
        count.check()


def test_more_candidates_than_nodes_names_the_field(tmp_path):
    from cnn2gnn_dist.graph.search import knn

    base = np.eye(5, dtype=np.float32)
    with pytest.raises(UserError, match=r"5 neighbors .* 5 nodes") as caught:
        knn.search(base, base, 5, exclude_Q=np.arange(5))
    assert caught.value.where == "graph.candidates"


def test_overrides_read_numbers_as_people_write_them():
    config = settings.load(
        "demo", ["teacher.lr=1e-3", "graph.sampling.fanouts=[14, 2]", "data.test=null"]
    )
    assert config.teacher.lr == 0.001
    assert config.graph.sampling.fanouts == (14, 2)


def image_tree(root: Path, counts: dict[str, int]) -> Path:
    """One folder per class, with the given numbers of images."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(random_images(count, 8, 8, seed=number)):
            (root / name / f"{i}.png").write_bytes(encode_image(image))
    return root


def prepared(run: Path, *overrides: str) -> tuple[int, Manifest | None, Manifest | None]:
    """Exit code of pack and index in this process, and the manifests."""
    code = 0
    for stage in ("pack", "index"):
        code = code or cli.main([stage, "--config", "demo", f"run.dir={run}", *overrides])
    if code:
        return code, None, None
    return code, *(Manifest.load(run / "manifest" / f"{p}.arrow") for p in ("train", "test"))


def test_a_held_out_folder_without_one_class_is_matched_by_name(tmp_path, capsys):
    train = image_tree(tmp_path / "train", {"blue": 3, "green": 3, "red": 3})
    held = image_tree(tmp_path / "val", {"green": 2, "red": 2})
    data = ("data.source=imagefolder", f"data.train={train}", f"data.test={held}")
    code, _, test = prepared(tmp_path / "run", *data)
    said = capsys.readouterr().err
    assert code == 0
    assert test.classes == ("blue", "green", "red")
    for row in range(len(test)):
        assert test.key(row).startswith(test.classes[test.label_N[row]])
    assert "note: held-out images number the classes differently: matched by name" in said
    assert "note: 1 of 3 classes have no held-out image" in said
    code, _, test = prepared(tmp_path / "run2", *data, "data.num_classes=3")
    assert (code, test.classes) == (0, ("blue", "green", "red"))


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"green": 2, "mauve": 2}, ("'mauve'", "data.test")),
        ({"x": 2, "y": 2}, ("'x', 'y'", "data.test")),
    ],
)
def test_unknown_held_out_classes_are_refused(tmp_path, capsys, held, says):
    train = image_tree(tmp_path / "train", {"blue": 2, "green": 2})
    test = image_tree(tmp_path / "val", held)
    data = ("data.source=imagefolder", f"data.train={train}", f"data.test={test}")
    assert prepared(tmp_path / "run", *data)[0] == 2
    said = capsys.readouterr().err
    assert all(part in said for part in says)


def test_the_remedy_for_an_empty_class_works_as_written(tmp_path, capsys):
    images = random_images(4, 8, 8)
    make_shards(tmp_path / "a", images, [0, 0, 2, 2])
    data = ("data.source=shards", f"data.train={tmp_path}/a/*.tar")
    run = ["index", "--config", "demo", f"run.dir={tmp_path}/run", *data]
    assert cli.main(run) == 2
    remedy = capsys.readouterr().err.split("remedy:")[1]
    setting = re.search(r"data\.\S+=true", remedy).group()
    assert cli.main([*run, setting]) == 0
    train = Manifest.load(tmp_path / "run" / "manifest" / "train.arrow")
    assert (train.classes, sorted(train.label_N.tolist())) == (("0", "1", "2"), [0, 2])


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"a": 1, "b": 1, "c": 1}, ("no held-out image", "every class has one image", "data.test")),
        ({"only": 12}, ("one class", "data.train")),
        ({"train": 3, "val": 3}, ("splits of a data set", "data.train=", "data.test=")),
    ],
)
def test_degenerate_sets_are_refused_before_any_training(tmp_path, capsys, counts, says):
    tree = image_tree(tmp_path / "in", counts)
    data = ("data.source=imagefolder", f"data.train={tree}")
    assert prepared(tmp_path / "run", *data)[0] == 2
    said = capsys.readouterr().err
    assert all(part in said for part in says), said
    assert not (tmp_path / "run" / "manifest" / "train.arrow").exists()


def test_too_few_images_are_reported_at_index(tmp_path, capsys):
    """Including what only a later stage would run into, with the requirement of each stage."""
    tree = image_tree(tmp_path / "in", {"a": 6, "b": 6})
    run = ["--config", "demo", f"run.dir={tmp_path}/run", "data.source=imagefolder"]
    run += [
        f"data.train={tree}",
        "device=cpu",
        "teacher.global_batch=2",
        "graph.partition.parts=1",
        "data.calibration=0",
    ]
    assert cli.main(["pack", *run]) == cli.main(["index", *run]) == 0
    said = capsys.readouterr().err
    assert "note: 8 training images are fewer than one global batch of 64" in said
    assert "note: 16 candidates for each of 8 training images" in said
    config = settings.load("demo", run[2:])
    stages = ("teacher", "student", "control")
    assert [e.where for e in preflight.misfits(config, ("teacher",), 8)] == []
    assert [e.where for e in preflight.misfits(config, stages, 64)] == []
    assert [e.where for e in preflight.misfits(config, ("student",), 16)] == [
        *("student.global_batch", "graph.candidates")
    ]
    large = [*run[2:], "teacher.global_batch=64"]
    (short,) = preflight.misfits(settings.load("demo", large), ("teacher",), 8)
    assert short.where == "teacher.global_batch"
    given = settings.load("demo", [*large, "teacher.epochs=0", "teacher.weights=w.pth"])
    assert preflight.misfits(given, ("teacher",), 8) == []  # it is not trained
    # Only labelled images are neighbors.
    (short,) = preflight.misfits(config, stages, 64, 10)
    assert short.what.startswith("16 candidates for each of 10 labeled training images")
    assert short.remedy.startswith("graph.candidates=9 or less")
    assert preflight.misfits(config, stages, 64, 17) == []
    (short,) = preflight.misfits(config, ("teacher",), 64, 1)
    assert short.what.startswith("1 labeled training images are fewer than one global batch of")
    few = ["graph.scope=batch", "graph.neighbours=4", "student.global_batch=8"]
    batch = settings.load("demo", [*run[2:], *few])
    assert preflight.misfits(batch, stages, 8) == []


@pytest.mark.parametrize(
    ("ranks", "batch", "most", "rows", "remedies"),
    [
        (4, 32, 256, 8, ["student.global_batch=48", "graph.neighbours=6"]),
        (1, 100, 12, 10, ["student.max_micro_batch=20", "graph.neighbours=8"]),
        (2, 254, 64, 1, ["student.max_micro_batch=127"]),
        (2, 24, 256, 12, None),
        (1, 96, 12, 12, None),
    ],
)
def test_a_micro_batch_that_is_the_graph_holds_enough_candidates(
    ranks, batch, most, rows, remedies
):
    """On all ranks together, or in all micro-batches, there would be enough for k = 10."""
    given = ["graph.scope=batch", f"student.global_batch={batch}", "graph.neighbours=10"]
    given += [f"student.max_micro_batch={most}", "teacher.global_batch=64"]
    if remedies is None:
        preflight.check(settings.load("demo", given), ["student"], ranks)
        return
    with pytest.raises(UserError) as caught:
        preflight.check(settings.load("demo", given), ["student"], ranks)
    assert f"of {rows} per rank, too few for k=10" in caught.value.what
    assert caught.value.remedy == ", or ".join(remedies)
    for remedy in remedies:
        preflight.check(settings.load("demo", [*given, remedy]), ["student"], ranks)
    preflight.check(settings.load("demo", given), ["teacher"], ranks)
    preflight.check(settings.load("demo", [*given, "graph.scope=dataset"]), ["teacher"], ranks)


def test_a_table_of_candidates_has_no_rows_for_images_without_a_label():
    table, remedy = "graph.sampling.query=table", "graph.sampling.query=live"
    config = settings.load("demo", [table])
    (wrong,) = preflight.misfits(config, ("student",), 1000, 900)
    assert wrong.where == "graph.sampling.query"
    assert wrong.what.startswith("100 training images have no label")
    assert wrong.remedy.startswith(remedy)
    assert preflight.misfits(config, ("teacher", "graph", "control"), 1000, 900) == []
    assert preflight.misfits(config, ("student",), 1000, 1000) == []
    for other in (remedy, "graph.scope=batch"):
        cured = settings.load("demo", [table, other])
        assert preflight.misfits(cured, ("student",), 1000, 900) == []


@pytest.mark.parametrize("section", ["teacher", "student"])
def test_a_training_whose_only_step_has_no_learning_rate_is_refused(section):
    config = settings.load("demo", [f"{section}.epochs=1", f"{section}.global_batch=64"])
    assert rate_at(getattr(config, section), 1.0, 0.5) == 0  # the step's own, counted from its end
    (wrong,) = preflight.misfits(config, (section,), 127)
    assert wrong.where == f"{section}.epochs"
    assert wrong.what.startswith("127 images in one epoch are one step of 64")
    assert f"{section}.global_batch=63 or less" in wrong.remedy
    assert preflight.misfits(config, (section,), 128) == []
    for other in (
        f"{section}.epochs=2",
        f"{section}.global_batch=63",
        f"{section}.schedule=triangular",
    ):
        least = settings.load("demo", [f"{section}.epochs=1", f"{section}.global_batch=64", other])
        assert preflight.misfits(least, (section,), 127) == []
    given = ["teacher.epochs=0", "teacher.weights=w.pth", "teacher.global_batch=64"]
    assert preflight.misfits(settings.load("demo", given), ("teacher",), 64) == []


def test_small_classes_are_accepted_and_single_images_are_reported():
    assert preflight.check_classes(np.array([0] * 90 + [1] * 2), 20, 0.2) == []
    assert (
        "1 of 2 classes have a single"
        in preflight.check_classes(np.array([0] * 9 + [1]), 3, 0.2)[0]
    )
    assert "every class has a single" in preflight.check_classes(np.array([0, 1]), 3, None)[0]


def test_a_source_that_reads_one_folder_refuses_two(tmp_path, capsys):
    """It used to ignore the second without a word."""
    a, b = (image_tree(tmp_path / name, {"x": 2, "y": 2}) for name in "ab")
    data = ("data.source=imagefolder", f"data.train=[{a}, {b}]")
    assert prepared(tmp_path / "run", *data)[0] == 2
    assert "reads one folder, but 2 are given" in capsys.readouterr().err
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.parquet").touch()
    assert (
        prepared(tmp_path / "run2", "data.source=imagefolder", f"data.train={tmp_path}/c")[0] == 2
    )
    assert "data.source=parquet" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["shards", "imagefolder"])
def test_held_out_images_that_are_training_images_are_reported(tmp_path, capsys, source):
    if source == "shards":
        first, second = make_shards(
            tmp_path / "a", random_images(8, 8, 8), [0, 1] * 4, shard_size=4
        )
        data = (f"data.train=[{first}, {second}]", f"data.test={tmp_path}/a/../a/{second.name}")
    else:
        tree = image_tree(tmp_path / "in", {"a": 4, "b": 4})
        data = (f"data.train={tree}", f"data.test={tree}/")
    run = ["--config", "demo", f"run.dir={tmp_path}/run", f"data.source={source}", *data]
    stages = ("index",) if source == "shards" else ("pack", "index")
    assert [cli.main([stage, *run]) for stage in stages] == [0] * len(stages)
    assert (
        "note: 1 of 1 held-out files or folders are also training ones" in capsys.readouterr().err
    )


def test_without_a_command_they_are_all_listed(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    listed = capsys.readouterr().err
    assert "cnn2gnn run --config demo" in listed
    for name in ["run", *cli.STAGES, *(name for name, _, _ in cli.COMMANDS)]:
        assert re.search(rf"^    {name}\b", listed, re.MULTILINE), name


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, _ in cli.COMMANDS])
def test_help_says_what_a_command_does(name, text, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    said = capsys.readouterr().out.split("\n\n")[1]
    assert said[0].isupper() or " ".join(said.split()) == text
