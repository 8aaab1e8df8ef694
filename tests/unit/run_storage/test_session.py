"""A run between scratch and storage: what is restored, fetched, kept and set aside (with a store in memory)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cnn2gnn_dist import durable, ledger
from cnn2gnn_dist.commands.run.stored_run import checkpoints_at
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Entry, Status
from cnn2gnn_dist.run_storage.session import RunStorage, held_back
from cnn2gnn_dist.run_storage.store import Damaged, Store, TakenOver
from cnn2gnn_dist.run_storage.training_copies import TrainingCopies
from cnn2gnn_dist.training.checkpoint import folder as disk

URL = "memory://runs/one"


def opened(root: Path) -> RunStorage:
    storage = RunStorage.open(root, URL)
    ledger.claim(root, "name: one\n")
    return storage


def checkpoint(stage: Path, step: int, size: int = 100) -> Path:
    final = disk.path_of(disk.root_of(stage), step)
    work = final.with_name(final.name + ".tmp")
    work.mkdir(parents=True)
    path = work / "rank-00000-of-00001.safetensors"
    path.write_bytes(bytes([step]) * size)
    disk.publish(work, final, {"format": disk.FORMAT, "step": step}, [disk.describe(path)])
    return final


def finished(stage: Path, names: dict[str, bytes], key: str = "k") -> None:
    ledger.begin(stage, Entry(key, {}))
    for name, data in names.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(data)
    files = [stage / name for name in names]
    ledger.finish(stage, Entry(key, {}, outputs=ledger.outputs(stage, files)))


def test_a_finished_stage_is_complete_elsewhere_before_its_files_come(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    storage = opened(here)
    finished(here / "targets", {"a.parquet": b"soft", "b.parquet": b"targets"})
    (here / "targets" / "dense").mkdir()
    (here / "targets" / "dense" / "x.npy").write_bytes(b"made again")
    storage.keep_stage("targets", made=True)

    other = opened(there)
    assert sorted(p.name for p in (there / "targets").iterdir()) == [
        ledger.HELD, "begin.json", ledger.DONE,
    ]  # fmt: skip
    assert ledger.status(there / "targets", "k")[0] is Status.COMPLETE
    assert held_back(there, ["targets"]) == URL
    assert held_back(here, ["targets"]) is None
    other.fetch("targets")
    assert (there / "targets" / "b.parquet").read_bytes() == b"targets"
    assert not (there / "targets" / "dense").exists()
    assert held_back(there, ["targets"]) is None
    assert (there / ledger.CONFIG).read_text() == "name: one\n"


def test_a_training_in_progress_comes_with_its_checkpoints_graphs_and_metrics(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    storage = opened(here)
    stage = here / "student"
    ledger.begin(stage, Entry("k", {}))
    (stage / "metrics.jsonl").write_text('{"step": 1}\n')
    checkpoint(stage, 1)
    checkpoint(stage, 2)
    version = stage / "graph" / "v0001"
    version.mkdir(parents=True)
    (version / "x.npy").write_bytes(b"rows")
    listed = {"files": {"x.npy": [4, durable.sha256(version / "x.npy")]}, "meta": {}}
    (version / "manifest.json").write_text(json.dumps(listed))
    (stage / "graph" / "v0002.tmp").mkdir()
    (stage / "graph" / "v0002.tmp" / "x.npy").write_bytes(b"half")
    copies = TrainingCopies(storage, stage)
    assert copies.start() is None
    assert copies.wait() is None

    other = opened(there)
    assert ledger.status(there / "student", "k")[0] is Status.RESUME
    assert not list((there / "student").glob("checkpoints/*"))
    other.fetch("student", resumes=True)
    for step in (1, 2):
        assert disk.damage(disk.path_of(disk.root_of(there / "student"), step)) is None
    assert (there / "student" / "graph" / "v0001" / "x.npy").read_bytes() == b"rows"
    assert not (there / "student" / "graph" / "v0002.tmp").exists()
    assert (there / "student" / "metrics.jsonl").read_text() == '{"step": 1}\n'

    checkpoint(stage, 3)
    disk.prune(disk.root_of(stage), disk.path_of(disk.root_of(stage), 3), 2)
    assert copies.start() is not None or copies.wait() is not None  # the other writes by now


def test_pruned_checkpoints_go_from_the_storage(tmp_path):
    storage = opened(tmp_path)
    stage = tmp_path / "teacher"
    ledger.begin(stage, Entry("k", {}))
    copies = TrainingCopies(storage, stage)
    for step in range(1, 6):
        final = checkpoint(stage, step)
        disk.prune(disk.root_of(stage), final, 2)
        copies.start()
        assert copies.wait() is None
    kept = {
        name.split("/")[1] for name in Store.open(URL).records["teacher"].files if "step-" in name
    }
    assert kept == {"step-00000004", "step-00000005"}
    objects = [n for n in storage.store._below("files") if n.endswith(".safetensors")]
    assert len(objects) == 2
    assert copies.outcomes() == [None] * 5


def test_a_damaged_checkpoint_is_left_out_and_the_one_before_it_serves(tmp_path, caplog):
    import fsspec

    storage = opened(tmp_path / "here")
    stage = tmp_path / "here" / "teacher"
    ledger.begin(stage, Entry("k", {}))
    checkpoint(stage, 1)
    checkpoint(stage, 2)
    copies = TrainingCopies(storage, stage)
    copies.start()
    assert copies.wait() is None
    memory = fsspec.filesystem("memory")
    [victim] = [n for n in memory.find("/runs/one/files") if "step-00000002/rank" in n]
    memory.pipe_file(victim, b"\x07" * 100)

    other = opened(tmp_path / "there")
    other.fetch("teacher", resumes=True)
    assert (
        "checkpoint step-00000002: an object of the run's storage does not have the contents"
        in caplog.text
    )
    root = disk.root_of(tmp_path / "there" / "teacher")
    assert [p.name for p in disk.all_of(root) if disk.damage(p) is None] == ["step-00000001"]
    again = TrainingCopies(other, tmp_path / "there" / "teacher")
    again.start()  # stores what is whole
    assert again.wait() is None
    assert not any("step-00000002" in n for n in Store.open(URL).records["teacher"].files)


def test_a_damaged_file_of_a_finished_stage_is_an_error(tmp_path):
    import fsspec

    storage = opened(tmp_path / "here")
    finished(tmp_path / "here" / "shards", {"train-000000.tar": b"images"})
    storage.keep_stage("shards", made=True)
    memory = fsspec.filesystem("memory")
    [victim] = [n for n in memory.find("/runs/one/files/shards") if n.endswith(".tar")]
    memory.pipe_file(victim, b"imag")
    other = opened(tmp_path / "there")
    with pytest.raises(Damaged, match="has 4 bytes instead of 6") as caught:
        other.fetch("shards")
    assert caught.value.where.startswith(f"{URL}/files/shards/train-000000.")


def test_one_file_of_a_stage_is_fetched_without_the_others(tmp_path):
    storage = opened(tmp_path / "here")
    finished(tmp_path / "here" / "model", {"w": b"weights"})
    (tmp_path / "here" / "model" / "memory").mkdir()
    (tmp_path / "here" / "model" / "memory" / "forgotten.csv").write_bytes(b"key,class")
    storage.keep_stage("model", made=True)
    other, stage = opened(tmp_path / "there"), tmp_path / "there" / "model"
    for name in ("memory/forgotten.csv", "memory/none.csv"):
        other.fetch_file("model", name)
    assert (stage / "memory" / "forgotten.csv").read_bytes() == b"key,class"
    assert not (stage / "w").exists()
    (stage / "memory" / "forgotten.csv").write_bytes(b"more, by now")
    other.fetch_file("model", "memory/forgotten.csv")
    assert (stage / "memory" / "forgotten.csv").read_bytes() == b"more, by now"


def test_scratch_that_survived_is_used_unless_the_run_went_on_elsewhere(tmp_path, caplog):
    here, there = tmp_path / "here", tmp_path / "there"
    storage = opened(here)
    finished(here / "teacher", {"w": b"first"})
    storage.keep_stage("teacher", made=True)
    (here / "teacher" / "w").write_bytes(b"local")
    opened(here).fetch("teacher")
    assert (here / "teacher" / "w").read_bytes() == b"local"  # nothing is fetched that is there

    other = opened(there)
    other.set_aside("teacher")
    ledger.set_aside(there / "teacher")
    finished(there / "teacher", {"w": b"second"}, key="l")
    other.keep_stage("teacher", made=True)
    assert sorted(Store.open(URL).records) == ["run", "teacher", "teacher.old-1"]

    back = opened(here)
    assert (
        "the run has continued elsewhere; its files here are moved to teacher.old-1" in caplog.text
    )
    assert (here / "teacher.old-1" / "w").read_bytes() == b"local"
    back.fetch("teacher")
    assert (here / "teacher" / "w").read_bytes() == b"second"


def test_a_run_that_was_made_without_storage_is_adopted(tmp_path):
    ledger.claim(tmp_path, "name: one\n")
    finished(tmp_path / "shards", {"train-000000.tar": b"images"})
    storage = opened(tmp_path)
    storage.keep_stage("shards", made=False)
    assert "train-000000.tar" in Store.open(URL).records["shards"].files


def test_a_folder_with_another_run_is_refused(tmp_path):
    opened(tmp_path / "here").keep_run()
    ledger.claim(tmp_path / "other", "name: two\n")
    with pytest.raises(UserError, match="holds another run than memory://runs/one"):
        RunStorage.open(tmp_path / "other", URL)


def test_what_the_storage_no_longer_has_is_not_taken_as_kept_there(tmp_path):
    """The remedy for a damaged record is to remove it: the stage is then run again."""
    here, there = tmp_path / "here", tmp_path / "there"
    storage = opened(here)
    finished(here / "targets", {"a.parquet": b"soft"})
    storage.keep_stage("targets", made=True)
    opened(there)
    assert ledger.status(there / "targets", "k")[0] is Status.COMPLETE
    Store.open(URL)._files.remove(f"{URL}/records/targets.json")
    opened(there)
    status, entry = ledger.status(there / "targets", "k")
    assert status is Status.RESUME
    assert entry is not None
    assert ledger.missing(there / "targets", entry) == "a.parquet is missing"


def test_a_folder_with_a_part_of_a_run_is_not_moved_to_another_storage(tmp_path):
    """The files that it does not have would be recorded as stored there."""
    here, there = tmp_path / "here", tmp_path / "there"
    storage = opened(here)
    finished(here / "targets", {"a.parquet": b"soft"})
    storage.keep_stage("targets", made=True)
    opened(there)
    with pytest.raises(
        UserError, match="parts of this run are only in memory://runs/one"
    ) as caught:
        RunStorage.open(there, "memory://runs/two")
    assert "run.storage=memory://runs/one" in str(caught.value.remedy)
    assert Store.open("memory://runs/two").records == {}
    moved = RunStorage.open(here, "memory://runs/two")  # which has everything
    moved.keep_stage("targets", made=False)
    assert "a.parquet" in Store.open("memory://runs/two").records["targets"].files


def test_a_truncated_file_of_a_finished_stage_is_fetched_again(tmp_path):
    here = tmp_path / "here"
    storage = opened(here)
    finished(here / "targets", {"a.parquet": b"soft"})
    storage.keep_stage("targets", made=True)
    (here / "targets" / "a.parquet").write_bytes(b"so")
    opened(here).fetch("targets")
    assert (here / "targets" / "a.parquet").read_bytes() == b"soft"


def test_the_run_that_was_overtaken_ends_at_its_next_checkpoint(tmp_path):
    first = opened(tmp_path / "here")
    stage = tmp_path / "here" / "teacher"
    ledger.begin(stage, Entry("k", {}))
    opened(tmp_path / "there")
    checkpoint(stage, 1)
    copies = TrainingCopies(first, stage)
    copies.start()
    copies.wait()
    with pytest.raises(TakenOver):
        copies.outcomes()


@pytest.mark.parametrize("name", ["teacher", "student", "one"])
def test_a_run_whose_url_ends_with_the_name_of_a_stage_is_not_taken_for_that_stage(tmp_path, name):
    url = f"memory://runs/{name}"
    storage = RunStorage.open(tmp_path / "run", url)
    ledger.claim(tmp_path / "run", "name: one\n")
    for stage in ("teacher", "student"):
        path = checkpoint(tmp_path / "run" / stage, 3)
        files = {
            str(p.relative_to(tmp_path / "run" / stage)): p.read_bytes() for p in path.iterdir()
        }
        finished(tmp_path / "run" / stage, files)
        storage.keep_stage(stage, made=True)

    def found(place: str) -> dict[str, list[str]]:
        with checkpoints_at(place) as folder:
            steps = folder.rglob("step-*") if not folder.name.startswith("step-") else [folder]
            return {p.parents[1].name: sorted(f.name for f in p.iterdir()) for p in steps}

    files = ["manifest.json", "rank-00000-of-00001.safetensors", "state.json"]
    assert found(url) == found(f"{url}/") == {"teacher": files, "student": files}
    for stage in ("teacher", "student"):
        assert found(f"{url}/{stage}") == {stage: files}
        assert found(f"{url}/{stage}/checkpoints/step-00000003") == {stage: files}
    with pytest.raises(UserError, match="no run is stored here"):
        found("memory://runs/none/teacher")
