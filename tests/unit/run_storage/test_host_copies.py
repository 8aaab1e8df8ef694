"""Folders of hosts that share none with rank 0's: what stays in them, and what counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cnn2gnn_dist import durable, ledger, settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Entry, Status
from cnn2gnn_dist.pipeline import planning
from cnn2gnn_dist.pipeline.keys import Survey
from cnn2gnn_dist.run_storage import host_copies
from cnn2gnn_dist.run_storage.session import RunStorage
from cnn2gnn_dist.run_storage.store import Store
from cnn2gnn_dist.run_storage.training_copies import TrainingCopies
from cnn2gnn_dist.training.checkpoint import folder as disk

URL = "memory://runs/copies"


def opened(root: Path) -> RunStorage:
    storage = RunStorage.open(root, URL)
    ledger.claim(root, "name: one\n")
    return storage


def checkpoint(stage: Path, step: int, near: bool = True) -> disk.File:
    """A checkpoint of two ranks; without the second one's share, which is described, unless it is ``near``."""
    final = disk.path_of(disk.root_of(stage), step)
    work = final.with_name(final.name + ".tmp")
    work.mkdir(parents=True)
    shares = []
    for rank in (0, 1):
        (work / f"rank-{rank}").write_bytes(b"%d of %d" % (rank, step) * 50)
        shares.append(disk.describe(work / f"rank-{rank}"))
    disk.publish(work, final, {"format": disk.FORMAT, "step": step}, shares)
    if not near:
        (final / "rank-1").rename(stage.parent / f"share-{step}")
    return shares[1]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_another_hosts_shares_are_in_the_record_without_being_on_this_disk(tmp_path):
    """The other host uploads its own; a record names them once rank 0 knows of a complete checkpoint."""
    here, there = tmp_path / "here", tmp_path / "there"
    storage, stage = opened(here), here / "teacher"
    ledger.begin(stage, Entry("k", {}))
    copies, elsewhere = TrainingCopies(storage, stage, URL), TrainingCopies(None, stage, URL)
    for step in (1, 2, 3):
        share = checkpoint(stage, step, near=False)
        if step != 2:  # an upload that failed: this checkpoint is not complete anywhere
            elsewhere.send(f"step-{step:08d}", here / f"share-{step}", share)
            copies.note_sent(f"step-{step:08d}", [share])
        assert copies.start() is None
        assert copies.wait() is None
    names = {n.split("/")[1] for n in Store.open(URL).records["teacher"].files if "step-" in n}
    assert names == {"step-00000001", "step-00000003"}

    other = opened(there)
    other.fetch("teacher", resumes=True)
    for step in (1, 3):
        folder = disk.path_of(disk.root_of(there / "teacher"), step)
        assert disk.damage(folder) is None
        assert (folder / "rank-1").read_bytes() == b"1 of %d" % step * 50


def two_checkpoints_of_which_one_is_pruned(root):
    """The storage, the stage's folder and its copies, after both checkpoints have been sent."""
    storage, stage = opened(root), root / "teacher"
    ledger.begin(stage, Entry("k", {}))
    copies = TrainingCopies(storage, stage, URL)
    for step in (1, 2):
        share = checkpoint(stage, step, near=False)
        copies.send(f"step-{step:08d}", root / f"share-{step}", share)
        copies.note_sent(f"step-{step:08d}", [share])
        disk.prune(disk.root_of(stage), disk.path_of(disk.root_of(stage), step), 1)
    return storage, stage, copies


def test_shares_of_checkpoints_that_were_pruned_before_a_record_named_them_go(tmp_path):
    storage, _, copies = two_checkpoints_of_which_one_is_pruned(tmp_path)

    def objects() -> list[str]:
        return [name for name in storage.store._below("files") if "rank-1" in name]

    assert len(objects()) == 2
    for _ in (1, 2):  # an upload that was waiting could still have named it
        assert copies.start() is None
        assert copies.wait() is None
    [left] = objects()
    assert "step-00000002" in left


def test_shares_of_the_last_pruned_checkpoint_go_with_the_finished_stage(tmp_path):
    storage, stage, _ = two_checkpoints_of_which_one_is_pruned(tmp_path)
    files = [path for path in stage.rglob("*") if path.is_file() and path.name != "begin.json"]
    ledger.finish(stage, Entry("k", {}, outputs=ledger.outputs(stage, files)))
    storage.keep_stage("teacher", made=True)
    named = {n.split("/")[1] for n in Store.open(URL).records["teacher"].files if "rank-1" in n}
    assert named == {"step-00000002"}
    [left] = [name for name in storage.store._below("files") if "rank-1" in name]
    assert "step-00000002" in left


def test_a_finished_training_stays_complete_where_a_part_of_its_checkpoint_is_only_stored(tmp_path):
    """The folder of a host that becomes rank 0's may have its own rank's share of the last checkpoint alone."""
    here, there = tmp_path / "here", tmp_path / "there"
    first, stage = opened(here), here / "teacher"
    ledger.begin(stage, Entry("k", {}))
    checkpoint(stage, 1)
    files = [path for path in stage.rglob("*") if path.is_file() and path.name != "begin.json"]
    ledger.finish(stage, Entry("k", {}, outputs=ledger.outputs(stage, files)))
    first.keep_stage("teacher", made=True)

    for lost in ({"rank-0"}, {"rank-0", disk.MANIFEST}, {"rank-0", "rank-1", disk.STATE}):
        shutil.rmtree(there, ignore_errors=True)
        host_copies.begin(there, URL)
        ledger.claim(there, "name: one\n")
        shutil.copytree(disk.root_of(stage), disk.root_of(there / "teacher"))
        final = disk.path_of(disk.root_of(there / "teacher"), 1)
        for name in lost:
            (final / name).unlink()
        storage = opened(there)
        assert planning._damage(Survey(settings.load()), there / "teacher") == ""
        storage.fetch("teacher")
        assert disk.damage(final) is None
    (final / "rank-0").write_bytes(b"?" * (final / "rank-0").stat().st_size)
    assert "rank-0 is damaged" in planning._damage(Survey(settings.load()), there / "teacher")
    (final / "rank-0").unlink()
    (there / "teacher" / ledger.HELD).unlink()
    assert "rank-0 is missing" in planning._damage(Survey(settings.load()), there / "teacher")


def test_a_copy_whose_host_becomes_rank_0s_keeps_what_the_storage_has(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    first = opened(here)
    for name in ("teacher", "targets"):
        ledger.begin(here / name, Entry("k", {}))
        (here / name / "a").write_bytes(b"the same")
        (here / name / "b").write_bytes(b"of rank 0")
        files = [here / name / "a", here / name / "b"]
        done = Entry("k", {}, "digest", ledger.outputs(here / name, files))
        ledger.finish(here / name, done)
        first.keep_stage(name, made=True)

    host_copies.begin(there, URL + "/")
    ledger.claim(there, "name: another\n")
    (there / "teacher" / "deep").mkdir(parents=True)
    (there / "teacher" / "a").write_bytes(b"the same")
    (there / "teacher" / "b").write_bytes(b"of no run")  # as long as the right one
    (there / "teacher" / "deep" / "er").write_bytes(b"more")
    ledger.finish(there / "teacher", Entry("another", {}))
    (there / "student.old-1").mkdir()
    (there / "student.old-1" / "kept").write_bytes(b"as it was")
    (there / "results.json").write_text("{}")
    inode = (there / "teacher" / "a").stat().st_ino
    with pytest.raises(UserError, match="one host's copy of the run in memory://runs/copies"):
        host_copies.check_whole(there)

    second = opened(there)
    second.fetch("teacher")
    assert (there / "teacher" / "a").stat().st_ino == inode
    assert (there / "teacher" / "b").read_bytes() == b"of rank 0"
    assert not (there / "teacher" / "deep").exists()
    assert not (there / "results.json").exists()
    assert (there / "student.old-1" / "kept").read_bytes() == b"as it was"
    assert ledger.status(there / "targets", "k")[0] is Status.COMPLETE
    assert not (there / "targets" / "a").exists()  # not needed
    assert (there / ledger.CONFIG).read_text() == "name: one\n"
    host_copies.check_whole(there)


def test_a_plan_with_a_copy_is_that_of_the_storage(tmp_path):
    here, there, view = tmp_path / "here", tmp_path / "there", tmp_path / "view"
    first = opened(here)
    ledger.begin(here / "teacher", Entry("k", {}))
    first.upload("teacher")
    first.uploads["teacher"].wait()
    host_copies.begin(there, URL)
    ledger.claim(there, "name: one\n")
    (there / "teacher").mkdir()
    ledger.finish(there / "teacher", Entry("stale", {}))
    before = files_below(there)
    view.mkdir()
    _, moved = RunStorage.look(there, URL, view)
    assert moved == []
    assert ledger.status(view / "teacher", "k")[0] is Status.RESUME
    assert files_below(there) == before


def test_a_plan_does_not_write_into_what_a_kill_has_left(tmp_path):
    root, view = tmp_path / "run", tmp_path / "view"
    storage = opened(root)
    ledger.begin(root / "teacher", Entry("k", {}))
    storage.upload("teacher")
    storage.uploads["teacher"].wait()
    for name in (ledger.NOTE, f"teacher/{ledger.HELD}"):
        (root / f"{name}.tmp").write_text("half")
    before = files_below(root)
    view.mkdir()
    RunStorage.look(root, URL, view)
    assert ledger.held(view / "teacher")
    assert files_below(root) == before


def test_a_folder_of_something_else_does_not_become_a_copy(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match="not a run folder"):
        host_copies.begin(tmp_path, URL)
    run = tmp_path / "run"
    ledger.claim(run, "name: one\n")
    with pytest.raises(UserError, match="this folder holds another run than memory://runs/copies"):
        host_copies.begin(run, URL)
    assert not (run / ledger.NOTE).exists()
    opened(tmp_path / "mine")
    host_copies.begin(tmp_path / "mine", URL)  # rank 0 is on another host this time
    assert host_copies.is_copy(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / ledger.NOTE).read_text()) == {"url": URL, "copy": True}
    assert durable.sha256(tmp_path / "mine" / ledger.CONFIG)


@pytest.mark.parametrize("url", [URL + "-typo", URL])
@pytest.mark.parametrize(
    "made", ["teacher/done.json", "teacher/checkpoints/step-000003/x", "pack/x"]
)
def test_a_copy_of_a_run_that_the_storage_does_not_hold_loses_nothing(tmp_path, url, made):
    """A wrong address, or a storage that has been emptied; the start of a run may be lost, as on any kill."""
    root = tmp_path / "run"
    host_copies.begin(root, URL)
    ledger.claim(root, "name: one\n")
    path = root / made
    path.parent.mkdir(parents=True)
    path.write_text("days of work")
    if made == "pack/x" and url == URL:
        RunStorage.open(root, url)
        assert not path.exists()
        return
    for use in (lambda: RunStorage.open(root, url), lambda: RunStorage.look(root, url, tmp_path)):
        with pytest.raises(UserError, match="does not hold") as caught:
            use()
        assert f"run.storage={URL}" in caught.value.remedy
    assert path.read_text() == "days of work"
    assert host_copies.read_note(root)["url"] == URL
