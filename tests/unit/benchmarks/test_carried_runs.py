"""Runs that travel from one machine to the next: what comes along, what is left behind, and that it is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cnn2gnn_dist import ledger, settings
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support.benchmarks import benchmark

carried_runs = benchmark("carried_runs")
gpu_mini_imagenet = benchmark("gpu_mini_imagenet")

MB = 10**6


def tensors(seed: int, averaged: bool = False) -> dict[str, Tensor]:
    """Weights, momentum and buffers of a small network, as two ranks' checkpoint names them."""
    torch.manual_seed(seed)
    names = ["w/cnn.weight", "m/cnn.weight", "b/cnn.mean", "own-1/cnn.mean"]
    names += ["a/cnn.weight", "c/cnn.mean"] if averaged else []
    return {name: torch.randn(50, 100) for name in names}


def save(stage: Path, step: int, found: dict[str, Tensor]) -> None:
    """A checkpoint in two shares."""
    final = disk.path_of(disk.root_of(stage), step)
    work = final.with_name(final.name + ".tmp")
    work.mkdir(parents=True)
    names = sorted(found)
    for rank in range(2):
        name = f"rank-0000{rank}-of-00002"
        save_file({one: found[one] for one in names[rank::2]}, work / f"{name}.safetensors")
        (work / f"{name}.json").write_text(json.dumps({"rank": rank}))
    files = [disk.describe(path) for path in sorted(work.iterdir())]
    disk.publish(work, final, {"format": disk.FORMAT, "extra": {"norms": [[0, 8]]}}, files)


def finish(stage: Path, files: list[Path]) -> None:
    entry = ledger.Entry(
        f"key of {stage.name}", {"seed": 0}, digest=f"digest of {stage.parent.name}"
    )
    ledger.begin(stage, entry)
    ledger.finish(
        stage, ledger.Entry(**(entry.__dict__ | {"outputs": ledger.outputs(stage, files)}))
    )


def train(stage: Path, found: dict[str, Tensor]) -> None:
    """A finished training with an earlier checkpoint besides the last one."""
    save(stage, 1, tensors(99))
    save(stage, 2, found)
    (stage / "metrics.jsonl").write_text(f'{{"of": "{stage}"}}\n')
    finish(stage, sorted(disk.path_of(disk.root_of(stage), 2).iterdir()))


def write(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A machine on which one run is finished, and the other is cut while its student is trained."""
    store = tmp_path / "store"
    done, cut = store / "runs" / "resnet50", store / "runs" / "resnet152"
    for run in (done, cut):
        write(run / "config.yaml", f"name: {run.name}")
        write(run / "shards" / "train-000000.tar", "images" * 1000)
        train(run / "teacher", tensors(1, averaged=run == cut))
        finish(run / "targets", [write(run / "targets" / "000000.parquet", f"of {run.name}")])
    train(done / "student", tensors(2))
    row = {"accuracy": 0.5, "parameters": 7, "flops": 2e6, "ms_per_image": 0.25}
    write(done / "results.json", json.dumps({"teacher": row}))
    finish(done / "model", [write(done / "model" / "model.safetensors", "m" * 3000)])
    for step in (1, 2, 3):
        save(cut / "student", step, tensors(10 + step))
    ledger.begin(cut / "student", ledger.Entry("key of student", {}))
    write(cut / "student" / "graph" / "v0008" / "candidates.npy", "candidates")
    write(cut / "student" / "tensorboard" / "events", "pictures")
    return store


def carry(store: Path, out: Path, limit: int = 10 * MB) -> list[str]:
    runs = [store / "runs" / name for name in ("resnet50", "resnet152")]
    left: list[str] = carried_runs.write(runs, out, store / ".carried", limit=limit, part=MB // 20)
    return left


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_empty_machine_goes_on_where_the_last_one_was_cut(store: Path, tmp_path: Path) -> None:
    out, runs = tmp_path / "out", tmp_path / "empty" / "runs"
    assert gpu_mini_imagenet.bring(store, out, 1, 60) == []
    runs.mkdir(parents=True)
    assert carried_runs.read(out, runs) == ["resnet152", "resnet50"]
    before, after = (contents(place) for place in (store / "runs", runs))
    done = {name for name in after if name.startswith("resnet50/")}
    assert {name for name in done if after[name] != before.get(name)} == {
        f"resnet50/{stage}-metrics.jsonl" for stage in ("teacher", "student")
    }
    assert done >= {"resnet50/results.json", "resnet50/model/model.safetensors"}
    assert not any(name.startswith("resnet50/teacher/") for name in done)
    assert carried_runs.is_finished(runs / "resnet50")
    assert not carried_runs.is_finished(runs / "resnet152")
    assert gpu_mini_imagenet.table(tmp_path / "empty") == gpu_mini_imagenet.table(store)
    student = {name for name in after if name.startswith("resnet152/student/")}
    kept = {name for name in before if name.startswith("resnet152/student/")}
    kept = {n for n in kept if "step-00000001" not in n and "step-00000002" not in n}
    assert student == {name for name in kept if "tensorboard" not in name}
    assert all(after[name] == before[name] for name in student)
    assert after["resnet152/targets/000000.parquet"] == b"of resnet152"
    assert not any("shards" in name for name in after)


def test_a_finished_stage_comes_along_complete_as_its_weights(store: Path, tmp_path: Path) -> None:
    runs = tmp_path / "empty" / "runs"
    carry(store, tmp_path / "out")
    carried_runs.read(tmp_path / "out", runs)
    old, new = (place / "resnet152" / "teacher" for place in (store / "runs", runs))
    entry, expected = ledger.finished(new), ledger.finished(old)
    assert entry is not None
    assert expected is not None
    assert (entry.key, entry.digest, entry.parts) == (expected.key, expected.digest, expected.parts)
    assert ledger.status(new, expected.key)[0] is ledger.Status.COMPLETE
    checkpoint = disk.recorded(new)
    assert checkpoint is not None
    assert disk.damage(checkpoint) is None
    assert disk.read_state(checkpoint)["extra"] == {"norms": [[0, 8]]}
    made = tensors(1, averaged=True)
    wanted = {"cnn.weight": made["a/cnn.weight"], "cnn.mean": made["c/cnn.mean"]}
    found = disk.load_weights(checkpoint)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    there = disk.read_tensors(checkpoint)
    assert there.keys() == {"w/cnn.weight", "b/cnn.mean"}
    assert [path.name for path in disk.all_of(disk.root_of(new))] == ["step-00000002"]
    assert carry(tmp_path / "empty", tmp_path / "again") == []  # and on to a third machine
    carried_runs.read(tmp_path / "again", tmp_path / "third")
    assert contents(tmp_path / "third") == contents(runs)


def test_parts_and_their_sum_stay_within_the_limits(store: Path, tmp_path: Path) -> None:
    write(tmp_path / "out" / "runs.tar.099", "of an earlier session")
    carry(store, tmp_path / "out")
    parts = sorted((tmp_path / "out").glob("runs.tar.*"))
    sizes = [path.stat().st_size for path in parts]
    assert len(sizes) > 2
    assert set(sizes[:-1]) == {MB // 20}
    assert parts[-1].name == f"runs.tar.{len(parts) - 1:03d}"
    whole = sum(sizes)
    for limit in (whole, whole // 2, whole // 4):
        carry(store, tmp_path / "less", limit)
        brought = list((tmp_path / "less").glob("runs.tar.*"))
        assert 0 < sum(path.stat().st_size for path in brought) <= limit


def names(left: list[str]) -> list[str]:
    return [one.partition(" (")[0] for one in left]


def test_measurements_go_first_and_a_finished_run_is_not_trained_again(
    store: Path, tmp_path: Path
) -> None:
    left = carry(store, tmp_path / "out", 40_000)  # a network alone has 40 kB
    assert names(left) == [
        "resnet152's teacher",
        "resnet152's targets",
        "resnet152's student in progress",
        # the model is small and needs none of them
    ]
    runs = tmp_path / "empty" / "runs"
    carried_runs.read(tmp_path / "out", runs)
    assert carried_runs.is_finished(runs / "resnet50")
    assert (runs / "resnet50" / "model" / "model.safetensors").is_file()
    cut = {path.name for path in (runs / "resnet152").iterdir()}
    assert cut == {"config.yaml", "teacher-metrics.jsonl"}  # no stage that looks half done
    assert carried_runs.is_finished(runs / "resnet50")


def test_a_run_that_came_without_its_model_is_finished_and_one_without_results_is_not(
    store: Path, tmp_path: Path
) -> None:
    done = store / "runs" / "resnet50"
    (done / "model" / "done.json").unlink()
    assert not carried_runs.is_finished(
        done
    )  # cut while its model was written: its student is there
    assert names(carry(store, tmp_path / "out", 40_000))[0] == "resnet50's teacher"
    carried_runs.read(tmp_path / "out", tmp_path / "runs")
    assert carried_runs.is_finished(tmp_path / "runs" / "resnet50")
    assert not carried_runs.is_finished(tmp_path / "runs" / "resnet152")


def test_without_the_last_checkpoint_the_finished_stages_still_go(
    store: Path, tmp_path: Path
) -> None:
    left = carry(store, tmp_path / "out", 110_000)
    assert names(left) == ["resnet152's student in progress"]
    assert "(0 MB)" in left[0]
    carried_runs.read(tmp_path / "out", tmp_path / "runs")
    there = {path.name for path in (tmp_path / "runs" / "resnet152").iterdir()}
    assert there == {"config.yaml", "teacher-metrics.jsonl", "teacher", "targets"}
    listed = json.loads((tmp_path / "out" / carried_runs.LIST).read_text())
    assert listed["left"] == left


def test_the_newest_checkpoint_that_is_complete_travels(store: Path, tmp_path: Path) -> None:
    student = store / "runs" / "resnet152" / "student"
    newest = disk.path_of(disk.root_of(student), 3)
    (newest / "rank-00001-of-00002.safetensors").write_bytes(b"half")
    carry(store, tmp_path / "out")
    carried_runs.read(tmp_path / "out", tmp_path / "runs")
    found = disk.all_of(disk.root_of(tmp_path / "runs" / "resnet152" / "student"))
    assert [path.name for path in found] == ["step-00000002"]
    assert disk.damage(found[0]) is None


def test_what_is_already_there_stays(store: Path, tmp_path: Path) -> None:
    carry(store, tmp_path / "out")
    mine = write(tmp_path / "runs" / "resnet152" / "config.yaml", "further")
    assert carried_runs.read(tmp_path / "out", tmp_path / "runs") == ["resnet50"]
    assert contents(mine.parent) == {"config.yaml": b"further"}
    assert sorted(path.name for path in mine.parent.parent.iterdir()) == ["resnet152", "resnet50"]


@pytest.mark.parametrize("fault", ["missing", "damaged", "unlisted"])
def test_a_part_that_got_lost_is_named(store: Path, tmp_path: Path, fault: str) -> None:
    out = tmp_path / "out"
    carry(store, out)
    part = out / "runs.tar.001"
    name: Any = part.name
    if fault == "missing":
        part.unlink()
    elif fault == "damaged":
        content = part.read_bytes()
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (out / carried_runs.LIST).unlink()
        name = carried_runs.LIST
    with pytest.raises(SystemExit, match=name):
        carried_runs.read(out, tmp_path / "runs")
    assert not any(path.name.startswith("resnet") for path in (tmp_path / "runs").glob("*"))


def test_the_first_session_has_nothing_to_restore(tmp_path: Path) -> None:
    assert carried_runs.read(tmp_path / "no-such-folder", tmp_path / "runs") == []
    (tmp_path / "back").mkdir()
    assert carried_runs.read(tmp_path / "back", tmp_path / "runs") == []


def recorded(run: Path, *, toy: bool, more: tuple[str, ...] = ()) -> Path:
    """A finished run's config, as another machine would have recorded it."""
    options = [*gpu_mini_imagenet.options_of(run.name, toy), f"run.dir={run}", *more]
    data = [f"data.{part}=/elsewhere/{part}.parquet" for part in ("train", "test")]
    config = settings.load("mini_imagenet", [*options, *data])
    write(run / "config.yaml", settings.as_yaml(config))
    write(run / "results.json", "{}")
    assert carried_runs.is_finished(run)
    return run


def test_a_finished_run_of_another_config_is_refused(tmp_path: Path) -> None:
    for name in gpu_mini_imagenet.RUNS:
        gpu_mini_imagenet.check(tmp_path / name, toy=False)  # nothing there yet
        gpu_mini_imagenet.check(recorded(tmp_path / name, toy=False), toy=False)
    toy = recorded(tmp_path / "toy" / "resnet50", toy=True)
    gpu_mini_imagenet.check(toy, toy=True)
    with pytest.raises(SystemExit, match=r"resnet50 was made with .*teacher\.epochs: 2 -> 200"):
        gpu_mini_imagenet.check(toy, toy=False)
    edited = recorded(tmp_path / "edited" / "resnet152", toy=False, more=("teacher.lr=0.2",))
    with pytest.raises(SystemExit, match=r"\(teacher\.lr: 0\.2 -> 0\.1\): give another STORE"):
        gpu_mini_imagenet.check(edited, toy=False)


@pytest.mark.parametrize("toy", [False, True])
def test_a_session_does_not_show_the_figures_of_another_config(tmp_path: Path, toy: bool) -> None:
    store = tmp_path / "store"
    for name in gpu_mini_imagenet.RUNS:
        recorded(store / "runs" / name, toy=not toy)
    write(tmp_path / "pieces" / gpu_mini_imagenet.LIST, "{}")
    line = ["run", str(store), "--pieces", str(tmp_path / "pieces"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="another config"):
        gpu_mini_imagenet.main([*line, *(["--toy"] if toy else [])])
    assert not (tmp_path / "out").exists()
