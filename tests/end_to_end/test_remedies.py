"""Every remedy that an error names works as written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn2gnn_dist import ledger, settings
from cnn2gnn_dist.commands.model import opening
from cnn2gnn_dist.commands.run import checkpoint
from cnn2gnn_dist.pipeline import runner
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support import runs
from tests.support.remedies import (
    Row,
    alternatives,
    carry_out,
    cnn2gnn,
    overridden,
    remedy_of,
    table,
)
from tests.support.runs import MICRO, weights
from tests.support.shards import encode_image, make_shards, random_images

SMALL = ["--config", "demo", "device=cpu", "data.limit=40"]


def elsewhere(place: Path) -> Path:
    """An override that names another folder for the run."""
    return place / "elsewhere"


# --- errors of stages without models ------------------------------------------------------------


def other_limit(place: Path) -> list[str]:
    made = ["pack", *SMALL, f"run.dir={place}/run"]
    assert cnn2gnn(made)[0] == 0
    return overridden(made, "data.limit=50")


def someone_elses_folder(place: Path) -> list[str]:
    (place / "run").mkdir()
    (place / "run" / "thesis.tex").touch()
    return ["pack", *SMALL, f"run.dir={place}/run"]


def no_deepspeed_config(place: Path) -> list[str]:
    return [
        *("pack", *SMALL, f"run.dir={place}/run"),
        *(f"{model}.ds_config={place}/none.json" for model in ("teacher", "student")),
    ]


def no_gpu(place: Path) -> list[str]:
    return overridden(["pack", *SMALL, f"run.dir={place}/run"], "device=cuda")


def images_gone(place: Path) -> list[str]:
    for label, name in enumerate("ab"):
        (place / "d" / name).mkdir(parents=True)
        for number, image in enumerate(random_images(4, 16, 16, seed=label)):
            (place / "d" / name / f"{number}.png").write_bytes(encode_image(image))
    made = ["pack", "--config", "demo", f"run.dir={place}/run", "data.source=imagefolder"]
    assert cnn2gnn([*made, f"data.train={place}/d"])[0] == 0
    return [*made, f"data.train={place}/gone"]


LIGHT = [
    Row(
        "another config",
        other_limit,
        "data.limit: 40 -> 50",
        {"run.dir": elsewhere},
        ("run.dir=…", "--update"),
    ),
    Row(
        "not a run's folder",
        someone_elses_folder,
        "is not a run folder",
        {"run.dir": elsewhere},
        ("run.dir=…",),
    ),
    Row(
        "no DeepSpeed config",
        no_deepspeed_config,
        "DeepSpeed config can't be read",
        only=("teacher.ds_config=null student.ds_config=null",),
    ),
    Row("no GPU", no_gpu, "torch finds none", only=("device=cpu", "device=auto")),
    Row(
        "images that moved",
        images_gone,
        "there is no such folder",
        {"data.train": lambda place: place / "d"},
        ("data.train=FOLDER",),
    ),
]


@pytest.mark.parametrize(("row", "alternative"), table(LIGHT))
def test_a_remedy_works_as_written(row, alternative, tmp_path):
    if row.name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    if " " in alternative:  # an alternative that takes two overrides
        failing = row.provoke(tmp_path)
        code, said = cnn2gnn(failing)
        assert code == 2, said
        assert row.says in said
        assert alternative in remedy_of(said)
        assert cnn2gnn(overridden(failing, *alternative.split()))[0] == 0
    else:
        carry_out(row, alternative, tmp_path)


@pytest.fixture
def held(tmp_path) -> Iterator[None]:
    script = (
        "import sys, pathlib; from cnn2gnn_dist.runtime.shared_files import folder_lock as f; "
        "f.take(pathlib.Path(sys.argv[1]), 0); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()


def test_another_folder_than_one_in_use(tmp_path, held, monkeypatch):
    monkeypatch.setattr(runner, "LOCK_SECONDS", 0.1)
    row = Row(
        "in use",
        lambda place: ["pack", *SMALL, f"run.dir={place}/run"],
        "another process",
        {"run.dir": elsewhere},
    )
    carry_out(row, "run.dir=…", tmp_path)


def test_what_counts_as_an_alternative():
    said = "x\n  where:  y\n  remedy: another run.dir=…, --update, or `cnn2gnn graph --update` (device=cpu)"
    assert alternatives(remedy_of(said)) == [
        "cnn2gnn graph --update",
        "--update",
        "run.dir=…",
        "device=cpu",
    ]


# --- errors of trainings and of what is built on them -------------------------------------------


@pytest.fixture
def copied(micro_run) -> Callable[[Path], list[str]]:
    """Copies the small run into a folder; returns its --config and overrides."""

    def copy(place: Path) -> list[str]:
        shutil.copytree(micro_run, place / "run")
        return ["--config", str(micro_run / "config.yaml"), f"run.dir={place}/run"]

    return copy


def damage_last(run: Path, stage: str) -> Path:
    """Flip a bit in the final checkpoint of a stage."""
    path = sorted((run / stage / "checkpoints").glob("step-*/rank-00001-*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path.parent


@pytest.mark.parametrize("alternative", ["--update", "--force", "run.dir=…"])
def test_ways_out_of_another_config_of_a_training(copied, tmp_path, alternative):
    row = Row(
        "another config of the teacher",
        lambda place: ["pack,index,teacher", *copied(place), "teacher.lr=0.004"],
        "teacher.lr: 0.005 -> 0.004",
        {"run.dir": elsewhere},
    )
    carry_out(row, alternative, tmp_path)


def test_a_stage_that_waits_says_for_what_and_run_makes_it(copied, tmp_path):
    def provoke(place: Path) -> list[str]:
        config = copied(place)
        (place / "run" / "shards" / "train-000000.tar").unlink(missing_ok=True)
        for path in (place / "run" / "shards").glob("*-000000.tar"):
            path.unlink()
        return ["index", *config]

    row = Row("waits", provoke, "waits for pack (pack: no longer complete: train-000000.tar is")
    carry_out(row, "cnn2gnn run", tmp_path)
    assert not list((tmp_path / "run").glob("*.old-*"))  # same shards: all else stays complete


@pytest.fixture
def damaged_student(copied, micro_run, tmp_path) -> tuple[Path, list[str], list[str]]:
    """A copy of the run whose student's last checkpoint is corrupt; its config; the command to run it."""
    config, run, image = copied(tmp_path), tmp_path / "run", tmp_path / "image.png"
    image.write_bytes(encode_image(random_images(1, 16, 16)[0]))
    assert damage_last(run, "student").name == "step-00000027"
    shutil.rmtree(run / "model")  # would answer, since it has its own copy of the weights
    ask = ["predict", "--run", str(run), str(image)]
    code, said = cnn2gnn(ask)
    assert code == 2
    assert "is not complete: rank-00001-of-00002.safetensors is damaged" in said
    assert "cnn2gnn student" in alternatives(remedy_of(said))
    return run, config, ask


def test_a_training_made_again_on_as_many_ranks_is_the_same(damaged_student, micro_run):
    """It is bit-identical: everything built on it stays complete, and gives the same answers as before."""
    run, _, ask = damaged_student
    code, said = runs.finish(runs.start(runs.launch(run), runs.environment()))
    assert code == 0, said[-4000:]
    for stage in ("graph", "control", "evaluate"):
        assert f"{stage:8} complete, skipped" in said
    assert disk.damage(disk.recorded(run / "student")) is None
    before = cnn2gnn([word.replace(str(run), str(micro_run)) for word in ask])
    assert before[0] == 0
    assert cnn2gnn(ask) == before


def test_a_training_made_again_on_other_ranks_is_another(damaged_student):
    """Its weights are never combined with the bank of the previous ones."""
    _, config, ask = damaged_student
    code, said = cnn2gnn(["student", *config])
    assert code == 0, said
    code, said = cnn2gnn(ask)
    assert code == 2
    assert "the graph of this run was built from a different student" in said
    assert "cnn2gnn graph --update" in alternatives(remedy_of(said))
    code, said = cnn2gnn(["graph", *config, "--update"])
    assert code == 0, said
    assert cnn2gnn(ask)[0] == 0


def test_a_plan_says_which_file_is_damaged(copied, tmp_path):
    config = copied(tmp_path)
    damage_last(tmp_path / "run", "teacher")
    code, said = cnn2gnn(
        ["checkpoint", "export", f"{tmp_path}/run/teacher", "--out", f"{tmp_path}/x"]
    )
    assert code == 2
    for command in alternatives(remedy_of(said)):
        code, said = cnn2gnn(command.split()[1:])
        assert code == 1  # verify found a corrupt one
        assert said.count("complete") == 1
    steps = {s.stage.name: s for s in runner.plan(settings.load(config[1], config[2:]))}
    assert steps["teacher"].status is ledger.Status.RESUME
    assert steps["teacher"].why == (
        "no longer complete: step-00000018: rank-00001-of-00002.safetensors is damaged"
    )
    assert steps["targets"].why == "waits for teacher"


@pytest.mark.parametrize("alternative", ["--update", "--force"])
def test_a_checkpoint_of_another_config(copied, micro_run, tmp_path, alternative):
    """As after a kill before the first save that follows ``--force``."""

    def provoke(place: Path) -> list[str]:
        config = [*copied(place), "teacher.lr=0.004"]
        stage = next(
            s
            for s in runner.plan(settings.load(config[1], config[2:]))
            if s.stage.name == "teacher"
        )
        folder = place / "run" / "teacher"
        ledger.begin(folder, ledger.Entry(str(stage.key), stage.parts, inputs=stage.inputs))
        return ["teacher", *config]

    row = Row("another run's checkpoint", provoke, "belongs to another run or config")
    carry_out(row, alternative, tmp_path)
    assert (tmp_path / "run" / "teacher.old-1").exists() == (alternative == "--update")


def test_a_graph_of_another_student_answers_nothing(copied, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(encode_image(random_images(1, 16, 16)[0]))

    def provoke(place: Path) -> list[str]:
        config = [*copied(place), "student.lr=0.004"]
        code, said = cnn2gnn(["student", *config, "--update"])
        assert code == 0, said
        return ["predict", "--run", str(place / "run"), str(image)]

    row = Row("graph of another student", provoke, "built from a different student")
    carry_out(row, "cnn2gnn graph --update", tmp_path)


def test_corrupt_images_are_repaired_or_left_out(tmp_path):
    def provoke(place: Path) -> list[str]:
        images, labels = random_images(32, 16, 16), np.arange(32) % 2
        (path,) = make_shards(place / "s", images, labels, shard_size=32)
        shutil.copy(path, place / "whole.tar")
        data = path.read_bytes()
        path.write_bytes(data.replace(b"IHDR", b"IHDr", 1))
        return [
            *("index,teacher", "--config", "demo", *MICRO, f"run.dir={place}/run"),
            *("data.source=shards", f"data.train={place}/s/*.tar"),
            *("teacher.global_batch=8", "teacher.epochs=1"),
        ]

    def failing(place: Path) -> list[str]:
        command = provoke(place)
        return [c for c in command if c not in ("teacher.global_batch=32", "teacher.epochs=2")]

    (tmp_path / "left out").mkdir()
    row = Row("corrupt", failing, "1 corrupt images among 24")
    carry_out(row, "data.max_corrupt=0.042", tmp_path / "left out")
    command = failing(tmp_path)
    code, said = cnn2gnn(command)
    assert code == 2
    assert "--update" in alternatives(remedy_of(said))
    shutil.copy(tmp_path / "whole.tar", tmp_path / "s" / "shard-000000.tar")
    code, said = cnn2gnn([*command, "--update"])
    assert code == 0, said
    assert "old results moved to teacher.old-1" in said


def test_batchnorm_that_continues_with_other_batches_is_reported(copied, micro_run, tmp_path):
    """Two ranks saw 16 images at a time; one rank sees 32 from here on, and the results would show it."""
    config = copied(tmp_path)
    damage_last(tmp_path / "run", "teacher")
    code, said = cnn2gnn(["teacher", *config])
    assert code == 0, said
    assert "BatchNorm now sees 32 images at a time, 16 until step 16" in said
    state = disk.read_state(disk.recorded(tmp_path / "run" / "teacher"))
    assert state["extra"]["norms"] == [[0, 16], [16, 32]]
    assert weights(tmp_path / "run" / "teacher") != weights(micro_run / "teacher")
    # What was built on the old weights is no longer complete.
    code, said = cnn2gnn(["targets", *config])
    assert code == 2
    assert "the stage teacher was rerun" in said
    assert "--update" in remedy_of(said)
    shutil.rmtree(tmp_path / "run")
    config = copied(tmp_path)
    damage_last(tmp_path / "run", "teacher")
    code, said = cnn2gnn(["teacher", *config, "teacher.max_micro_batch=16"])
    assert code == 0, said
    assert "BatchNorm" not in said


def test_a_refused_command_leaves_the_config_and_models_answer_as_they_were_made(copied, tmp_path):
    config, run = copied(tmp_path), tmp_path / "run"
    before = (run / "config.yaml").read_text()
    code, said = cnn2gnn(["run", *config, "views.mean=[0.1,0.1,0.1]", "graph.neighbours=2"])
    assert code == 2, said
    assert (run / "config.yaml").read_text() == before
    made = opening.context_of(run).config
    (run / "config.yaml").write_text(
        before.replace("neighbours: 4", "neighbours: 2").replace("size: 16", "size: 8")
    )
    assert settings.of_run(run).graph.neighbours == 2
    found = opening.context_of(run).config
    assert (found.graph.neighbours, found.views) == (4, made.views)
    assert found.views.size == 16
    about = checkpoint._about(disk.recorded(run / "teacher"))
    assert about["image_size"] == "16"


def test_a_training_that_is_repeated_builds_graphs_of_its_own(micro_run, tmp_path):
    """Its checkpoints are gone, and its micro-batches are others: the graphs on disk are of other weights."""
    run = tmp_path / "run"
    runs.copy_before(micro_run, run, "graph")
    shutil.rmtree(run / "student" / "checkpoints")
    paths = sorted((run / "student" / "graph").glob("v*/x.npy"))
    before = {path: np.load(path) for path in paths}
    assert len(before) == 2
    command = runs.launch(run, "student.max_micro_batch=8")
    code, said = runs.finish(runs.start([*command, "--stages", "student"], runs.environment()))
    assert code == 0, said
    assert "the graph of epoch 1 was built from other weights" in said
    assert sorted((run / "student" / "graph").glob("v*/x.npy")) == paths
    for path, features in before.items():
        assert (np.load(path) != features).any(), path
