"""Targets, final graph and evaluation of untrained models, on images some of which are corrupt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cnn2gnn_dist import ledger, settings
from cnn2gnn_dist.data.images.views import CLEAN
from cnn2gnn_dist.data.index import manifest as manifests
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.data.soft_targets import Targets
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Entry
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.report import page as report
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages import evaluate, graph, targets
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from cnn2gnn_dist.stages.shared.networks import Teacher, build_student
from cnn2gnn_dist.stages.shared.whitening import whiten_first_layers
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support import rank_group, runs
from tests.support.shards import encode_image, random_images, write_tar

C = 4
TRAIN, BAD_TRAIN = 60, (3, 31)
TEST, BAD_TEST = 21, (0, 7, 20)
KEYS = {stage: stage for stage in ("teacher", "targets", "student", "graph", "control")}


def shard(root: Path, part: str, count: int, corrupt: tuple[int, ...]) -> None:
    """One split of the data, and its manifest."""
    members = []
    for i, image in enumerate(random_images(count, 16, 16, seed=count)):
        members.append((f"{part}{i:02d}.cls", str(i % C).encode()))
        members.append((f"{part}{i:02d}.png", b"<html>" if i in corrupt else encode_image(image)))
    tar = write_tar(root / f"{part}-000000.tar", members)
    path = root / "manifest" / f"{part}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    manifests.index([tar], progress=False).save(path)


def finished(folder: Path, model: nn.Module) -> None:
    """Record a stage's training as finished with this model."""
    final = disk.path_of(folder / "checkpoints", 1)
    work = final.with_name(final.name + ".tmp")
    work.mkdir(parents=True)
    kinds = {name: "w" for name, _ in model.named_parameters()}
    tensors = {f"{kinds.get(n, 'b')}/{n}": t.contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, work / "rank-00000-of-00001.safetensors")
    (work / "rank-00000-of-00001.json").write_text("{}")
    files = [disk.describe(path) for path in sorted(work.iterdir())]
    about = {"format": disk.FORMAT, "run_id": "r", "step": 1, "extra": {}, "about": {}}
    disk.publish(work, final, about, files)
    outputs = ledger.outputs(folder, [path for path in final.iterdir() if path.is_file()])
    ledger.finish(folder, Entry(folder.name, {}, folder.name, outputs))


def context(root: Path, folder: str, *overrides: str) -> Context:
    micro = [o for o in runs.MICRO if not o.startswith(("data.", "views.pad"))]
    config = settings.load(
        "demo",
        [*micro, f"run.dir={root}", "views.kind=none", "graph.partition.parts=1", "targets.top_k=2",
         "evaluate.batch=8", "data.max_corrupt=0.5", *overrides],
    )  # fmt: skip
    (root / folder).mkdir(exist_ok=True)  # several ranks may get here at once
    ranks = Ranks.from_environment()
    return Context(config, ranks, RunPaths(root), root / folder, folder, "cpu", False)


@pytest.fixture
def root(tmp_path):
    """A run up to its trainings, with models whose gates are open."""
    shard(tmp_path, "train", TRAIN, BAD_TRAIN)
    shard(tmp_path, "test", TEST, BAD_TEST)
    return tmp_path


def trained(here: Context) -> None:
    torch.manual_seed(0)
    config, root = here.config, here.paths.root
    student = build_student(config, C, config.graph.scope)
    nn.init.normal_(student.gnn.gate1)
    nn.init.normal_(student.gnn.gate2)
    for name, model in (
        ("teacher", Teacher(config, C, initial=False)),
        ("student", student),
        ("control", build_student(config, C, "none")),
    ):
        finished(root / name, model)


def sound(root: Path) -> np.ndarray:
    return np.setdiff1d(np.arange(TEST), BAD_TEST)


def test_a_whitened_stem_from_a_file_keeps_its_first_layer(root: Path) -> None:
    """The later layers were trained on it."""
    first = build_stem("whitened_cnn", 32, 16, widths=[8])
    save_file(first.network.state_dict(), root / "w.safetensors")
    for args, kept in (
        ("widths: [8]", False),
        (f"widths: [8], weights: {root}/w.safetensors", True),
    ):
        here = context(
            root, "student", "student.stem=whitened_cnn", f"student.stem_args={{{args}}}"
        )
        model = build_student(here.config, C, "none")
        before = model.stem.network.first.weight.clone()
        whiten_first_layers(here, model)
        assert torch.equal(model.stem.network.first.weight, before) == kept
    assert torch.equal(before, first.network.first.weight)


def test_what_cannot_be_read_is_left_out_and_reported(root, capsys, console):
    here = context(root, "evaluation")
    trained(here)
    graph.run(context(root, "graph"))
    capsys.readouterr()
    evaluate.run(here, KEYS)
    said, table = "".join(capsys.readouterr()), json.loads((root / "results.json").read_text())
    assert list(table) == ["teacher", "student", "self_path", "vote", "control_mlp", "run"]
    for name in list(table)[:-1]:
        row, saved = table[name], np.load(root / "evaluation" / f"{name}.npz")
        assert (row["evaluated"], row["left_out"]) == (TEST - 3, 3)
        assert saved["ids"].tolist() == sound(root).tolist()
        np.testing.assert_array_equal(saved["labels"], sound(root) % C)
        assert row["accuracy"] == (saved["predicted"] == saved["labels"]).mean()
        assert row["parameters"] > 0
        assert row["flops"] > 0
        assert row["ms_per_image"] > 0
        assert row["ms_alone"] > 0
    assert table["run"]["test_images"] == TEST
    assert ["test00" in table["run"]["left_out"][0], len(table["run"]["left_out"])] == [True, 3]
    assert table["vote"]["parameters"] < table["student"]["parameters"]
    assert table["self_path"]["parameters"] == table["control_mlp"]["parameters"]
    assert table["self_path"]["flops"] == table["control_mlp"]["flops"] < table["student"]["flops"]
    assert table["student"]["graph_parameters"] == (
        table["student"]["parameters"] - table["self_path"]["parameters"]
    )
    assert "evaluated on 18 held-out images; 3 that can't be read are left out" in said
    page = (root / "report.html").read_text()
    assert "18 of 21 held-out images were evaluated" in page
    assert "Against its own self path" in page
    assert f"{table['vote']['accuracy']:.2%}" in page


def ranks_evaluate(root: str, scope: str) -> list[str]:
    """A case of ``rank_group``: the stage on several ranks; names of the rows on rank 0's disk."""
    here = context(Path(root), "evaluation", f"graph.scope={scope}")
    keys = KEYS if scope == "dataset" else {k: v for k, v in KEYS.items() if k != "graph"}
    return [path.stem for path in evaluate.run(here, keys)]


@pytest.mark.parametrize("scope", ["dataset", "batch"])
def test_two_ranks_evaluate_as_one_does(root, scope):
    here = context(root, "evaluation", f"graph.scope={scope}")
    trained(here)
    if scope == "dataset":
        graph.run(context(root, "graph"))
    names = ranks_evaluate(str(root), scope)
    alone = {name: dict(np.load(root / "evaluation" / f"{name}.npz")) for name in names}
    assert rank_group.run(ranks_evaluate, 2, str(root), scope) == [names] * 2
    for name in set(names) - {"gallery"}:
        together = np.load(root / "evaluation" / f"{name}.npz")
        for column, values in alone[name].items():
            np.testing.assert_array_equal(together[column], values)


def test_a_student_of_the_batch_has_a_self_path_and_no_vote(root, capsys, console):
    here = context(root, "evaluation", "graph.scope=batch", "student.control=false")
    trained(here)
    evaluate.run(
        here, {name: key for name, key in KEYS.items() if name not in ("graph", "control")}
    )
    table = json.loads((root / "results.json").read_text())
    assert "\nno control (student.control=false): " in "".join(capsys.readouterr())
    assert list(table) == ["teacher", "student", "self_path", "run"]
    assert {table[name]["evaluated"] for name in ("student", "self_path")} == {TEST - 3}


def test_what_pack_left_out_is_counted_with_the_rest(root, capsys, console):
    note = {"count": 5, "first": ["a/1.png: an HTML page", "b/2.png: an empty file"]}
    record = {"images": TEST, "left_out": {"corrupt": note, "hidden": {"count": 9, "first": []}}}
    (root / "shards").mkdir()
    (root / "shards" / "test-left-out.json").write_text(json.dumps(record))
    said = {}
    # The other two configs do not use the record, which is one of earlier data.
    for source, test in (("imagefolder", "x"), ("imagefolder", "null"), ("shards", "x")):
        data = [f"data.source={source}", "data.train=x", f"data.test={test}"]
        here = context(root, "evaluation", "graph.scope=batch", *data)
        trained(here)
        evaluate.run(here, {"teacher": "teacher", "student": "student"})
        said[source, test] = (
            "".join(capsys.readouterr()),
            json.loads((root / "results.json").read_text()),
        )
    printed, table = said["imagefolder", "x"]
    for name in ("teacher", "student", "self_path"):
        assert (table[name]["evaluated"], table[name]["left_out"]) == (TEST - 3, 8)
    assert (table["run"]["test_images"], table["run"]["left_out_at_pack"]) == (TEST, 5)
    assert table["run"]["left_out"][:2] == note["first"]
    assert "test00" in table["run"]["left_out"][2]
    assert (
        "evaluated on 18 held-out images; 8 that can't be read are left out (5 of them by pack)"
        in printed
    )
    for printed, table in (said["imagefolder", "null"], said["shards", "x"]):
        assert (table["student"]["left_out"], table["run"]["left_out_at_pack"]) == (3, 0)
        assert "3 that can't be read are left out\n" in printed


def test_the_page_counts_what_pack_left_out():
    results = {
        "student": {"evaluated": 64, "left_out": 15},
        "run": {"test_images": 64, "left_out": ["a/1.png: an HTML page"], "left_out_at_pack": 15},
    }
    assert report._left_out(results) == (
        "64 of 79 held-out images were evaluated. 15 can't be read and count as neither right nor "
        "wrong: a/1.png: an HTML page"
    )
    row = {
        "accuracy": 1,
        "balanced_accuracy": 1,
        "ece": 0,
        "parameters": 1,
        "flops": 1,
        "ms_per_image": 1,
    }
    results["student"] |= row
    assert evaluate.table(results).endswith(
        "; 15 that can't be read are left out (15 of them by pack)"
    )
    assert "no control" in evaluate.table(results)
    assert "no control" not in evaluate.table(results | {"control_mlp": row})


def test_more_than_the_limit_is_no_result(root):
    here = context(root, "evaluation", "graph.scope=batch", "data.max_corrupt=0.1")
    trained(here)
    with pytest.raises(UserError, match="3 corrupt held-out images among 21"):
        evaluate.run(here, {"teacher": "teacher", "student": "student"})
    assert not (root / "results.json").exists()


def test_targets_of_corrupt_images_are_uniform_and_counted(root, capsys, console):
    here = context(root, "targets", "targets.views=0")
    trained(here)
    targets.run(here, "teacher")
    assert "2 corrupt images have uniform targets" in capsys.readouterr().err
    found = Targets.load(root / "targets", TRAIN, C, {"key": "targets"})
    rows = np.exp(found.lookup(np.arange(TRAIN), 0))
    np.testing.assert_allclose(rows[list(BAD_TRAIN)], 1 / C, atol=1e-3)

    # The other images keep the teacher's two most probable classes; the rest is shared by the other two.
    teacher = Teacher(here.config, C, initial=False).eval()
    teacher.load_state_dict(disk.load_weights(disk.recorded(root / "teacher")))
    reader = Reader(ReaderSpec(str(here.paths.train_manifest), here.views()))
    good = np.setdiff1d(np.arange(TRAIN), BAD_TRAIN)
    with torch.no_grad():
        images = torch.from_numpy(reader.read(Request(good, CLEAN)).images)
        wanted = teacher(images).softmax(1).numpy()
    kept = np.argsort(-wanted, 1)[:, :2]
    np.testing.assert_allclose(
        np.take_along_axis(rows[good], kept, 1), np.take_along_axis(wanted, kept, 1), atol=2e-3
    )

    targets.run(here, "teacher")  # nothing left to do; corrupt images of the first run still count
    assert "2 corrupt images have uniform targets" in capsys.readouterr().err
    with pytest.raises(UserError, match="2 corrupt training images among 60") as caught:
        targets.run(context(root, "targets", "targets.views=0", "data.max_corrupt=0.01"), "teacher")
    assert "train03" in caught.value.what


def test_targets_are_not_resumed_in_another_precision(root, capsys, console):
    """``precision=auto`` means another one on another processor, and both have the same key."""
    images = [
        [(f"{part}{i}.{end}", data) for i, one in enumerate(random_images(6, 16, 16, seed=part))
         for end, data in (("cls", str(i % C).encode()), ("png", encode_image(one)))]
        for part in range(3)
    ]  # fmt: skip
    tars = [write_tar(root / f"t-{part}.tar", members) for part, members in enumerate(images)]
    manifests.index(tars, progress=False).save(root / "manifest" / "train.arrow")
    low, high = (context(root, "targets", f"precision={p}") for p in ("bfloat16", "float32"))
    trained(high)

    def made(here: Context) -> list[bytes]:
        return [path.read_bytes() for path in targets.run(here, "teacher")]

    def emptied() -> list[Path]:
        files = sorted((root / "targets").glob("*.parquet"))
        for path in files:
            path.unlink()
        return files

    wanted = made(high)
    assert made(high) == wanted
    emptied()
    other = made(low)
    assert all(a != b for a, b in zip(other, wanted, strict=True))
    assert "computed again" not in capsys.readouterr().err

    files = emptied()
    for path, data in zip(files[:2], other, strict=False):  # as a kill leaves them
        path.write_bytes(data)
    assert made(high) == wanted
    assert "the targets of 2 shards were computed in bfloat16" in capsys.readouterr().err


def test_a_class_without_a_readable_image_is_reported(root, capsys, console):
    shard(root, "train", TRAIN, range(1, TRAIN, C))
    here = context(root, "targets", "targets.views=0")
    trained(here)
    targets.run(here, "teacher")
    assert "1 classes without a training image that can be read, so they can't be learned: '1'" in (
        capsys.readouterr().err
    )


def test_corrupt_images_are_counted_when_the_graph_is_built(root):
    here = context(root, "graph", "data.max_corrupt=0.01")
    trained(here)
    with pytest.raises(UserError, match="2 corrupt training images among 60"):
        graph.run(here)
    assert not list((root / "graph").glob("v????"))
    with pytest.raises(UserError, match="2 corrupt training images among 60") as caught:
        graph.run(here)  # all images are embedded: it resumes after that, and is refused again
    assert "train03" in caught.value.what
